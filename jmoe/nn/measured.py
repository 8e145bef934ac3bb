"""What a layer measures: the experts' load, losses, and whatever else it reports.

All layers return a `Measured`, also those that measure nothing. `Transformer` stacks
them along a first dimension of layers L. Of microbatches and devices they become one by
`jmoe.parallel.reductions`: arrays are sums, and what is `reductions.Max` is a maximum.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jmoe.parallel import reductions

# What a loss is divided by for its mean over a step.
PER_TOKEN = "token"  # it is a sum over tokens
PER_MICROBATCH = "microbatch"  # each microbatch has a mean of its own
PER_STEP = "step"  # its parts of all microbatches sum to the step's


class Load(NamedTuple):
    """Exact counts of one MoE layer, int32; tokens that aren't real are in none.

    load_E: choices of each expert. dropped_sending, dropped_receiving: choices that
    weren't computed, by where there was no capacity. margin_EM: a histogram for the
    quantile rule, with M = 0 for the other rules.
    """

    load_E: jax.Array
    dropped_sending: jax.Array
    dropped_receiving: jax.Array
    margin_EM: jax.Array


@struct.dataclass
class Loss:
    """A layer's contribution to the objective, this device's share of a microbatch's.

    value: float32, unweighted. weight: it is multiplied by. per: PER_TOKEN,
    PER_MICROBATCH or PER_STEP, what it is a sum of.
    """

    value: jax.Array
    weight: float = struct.field(pytree_node=False)
    per: str = struct.field(pytree_node=False)

    def of(self, value: jax.Array) -> "Loss":
        """Returns this loss with another value."""
        return Loss(value, self.weight, self.per)


class Measured(NamedTuple):
    """What one layer, or a stack of layers, measured.

    load: None of layers without experts. losses: `Loss` by name. metrics: by name,
    arrays, which are sums, or `reductions.Max`; they are logged (`to_log`).
    """

    load: Load | None
    losses: Mapping[str, Loss]
    metrics: Mapping[str, Any]


NOTHING = Measured(None, {}, {})


def to_log(metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns what is logged of all layers' metrics: scalars of a layer by layer.

    Of arrays, which would be too many numbers, the sum over layers is.
    """
    found = {}
    for name, value in reductions.values(metrics).items():
        is_scalar = value.ndim == 1
        found |= {f"{name}_L": value} if is_scalar else {name: value.sum(0)}
    return found


def stack(parts: list[Measured]) -> Measured:
    """Returns one of a stack, of those of layers of one kind."""
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def beside(*parts: Measured) -> Measured:
    """Returns one of a layer, of those of its parts, each of which has other names."""
    loads = [part.load for part in parts if part.load is not None]
    losses, metrics = {}, {}
    for part in parts:
        assert not losses.keys() & part.losses.keys(), "a name stands for one loss"
        assert not metrics.keys() & part.metrics.keys(), "a name stands for one metric"
        losses |= part.losses
        metrics |= part.metrics
    assert len(loads) <= 1, "one part of a layer has experts"
    return Measured(loads[0] if loads else None, losses, metrics)


def join(*parts: Measured) -> Measured:
    """Returns one of all stacks in a row; each entry is of the layers that have it."""

    def joined(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)

    def by_name(entries: list[Mapping[str, Any]]) -> dict[str, Any]:
        names = dict.fromkeys(name for entry in entries for name in entry)
        return {name: joined([e[name] for e in entries if name in e]) for name in names}

    loads = [part.load for part in parts if part.load is not None]
    return Measured(
        load=joined(loads) if loads else None,
        losses=by_name([part.losses for part in parts]),
        metrics=by_name([part.metrics for part in parts]),
    )
