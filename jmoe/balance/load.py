"""How evenly the experts are loaded, from integer counts.

The measure that papers report is MaxVio (Loss-Free Balancing, arXiv 2408.15664,
section 4.1), by how much the busiest expert exceeds the mean load:

    MaxVio = (max_e c_e - m) / m,   averaged over the layers

*Batch* MaxVio takes the counts of one training batch, and says how well a step uses its
devices; even a perfect router has some, as a batch is a sample. *Global* MaxVio is the
same function of counts summed over the whole validation set, where the sampling noise
is gone; it says how well balanced the model is.

Counts are of choices, before any are dropped. Everything but `percentiles` works on
NumPy arrays and under jit, computes in float32 (totals may not fit in int32), and acts
on the last dimension. A layer that chose nothing counts as balanced: MaxVio 0, entropy
1, drop rate 0, though all its experts are dead.

Dimensions: L layers, E experts.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

_PERCENTILES = {"p50": 50, "p95": 95, "max": 100}


def max_violation(load_LE: Array) -> jax.Array:
    """Returns MaxVio averaged over layers, a scalar from 0 (balanced) to E - 1."""
    return max_violation_L(load_LE).mean()


def max_violation_L(load_LE: Array) -> jax.Array:
    """Returns MaxVio of each layer."""
    load_LE = jnp.asarray(load_LE, jnp.float32)
    mean_L = load_LE.mean(-1)
    return (load_LE.max(-1) - mean_L) / jnp.where(mean_L > 0, mean_L, 1)


def load_entropy(load_LE: Array) -> jax.Array:
    """Returns the load's entropy over experts [L], relative to log E: 1 is balanced."""
    load_LE = jnp.asarray(load_LE, jnp.float32)
    num_experts = load_LE.shape[-1]
    if num_experts == 1:
        return jnp.ones(load_LE.shape[:-1], jnp.float32)
    total_L1 = load_LE.sum(-1, keepdims=True)
    share_LE = load_LE / jnp.where(total_L1 > 0, total_L1, 1)
    entropy_L = jax.scipy.special.entr(share_LE).sum(-1) / math.log(num_experts)
    return jnp.where(total_L1[..., 0] > 0, entropy_L, 1)


def dead_experts(load_LE: Array) -> jax.Array:
    """Returns how many experts of each layer nobody chose: int32 [L]."""
    return (jnp.asarray(load_LE) == 0).sum(-1, dtype=jnp.int32)


def drop_rate(dropped: Array, routed: Array) -> jax.Array:
    """Returns the fraction of the choices in `routed` that were dropped.

    It is elementwise.
    """
    routed = jnp.asarray(routed, jnp.float32)
    return jnp.asarray(dropped, jnp.float32) / jnp.maximum(routed, 1)


def percentiles(name: str, value_L: Array) -> dict[str, float]:
    """Returns percentiles over layers of what each measured, computed on the host.

    The mean over layers hides one that is far from balance; a number for each layer
    doesn't fit into a line.

    Returns:
      name_p50: the median; name_p95: what 19 of 20 layers don't exceed, interpolated;
      name_max: the largest.
    """
    found = np.percentile(np.asarray(value_L, np.float64), list(_PERCENTILES.values()))
    return {
        f"{name}_{suffix}": float(value)
        for suffix, value in zip(_PERCENTILES, found, strict=True)
    }


def load_metrics(load_LE: Array, dropped_L: Array) -> dict[str, jax.Array]:
    """Returns what a training step reports of its experts' load, each of shape [L].

    Args:
      load_LE: how many (token, choice) pairs chose each expert.
      dropped_L: how many of these no expert computed.

    Returns:
      max_vio: float32, 0 is balanced (`max_violation_L`).
      load_entropy: float32 in [0, 1], 1 is balanced.
      dead_experts: int32.
      drop_rate: float32 in [0, 1].
    """
    routed_L = jnp.asarray(load_LE, jnp.float32).sum(-1)
    return {
        "max_vio": max_violation_L(load_LE),
        "load_entropy": load_entropy(load_LE),
        "dead_experts": dead_experts(load_LE),
        "drop_rate": drop_rate(dropped_L, routed_L),
    }
