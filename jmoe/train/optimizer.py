"""AdamW (arXiv 1711.05101) or Muon (kellerjordan.github.io/posts/muon), by optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmoe.config import OptimizerConfig
from jmoe.train import schedules


def make_optimizer(cfg: OptimizerConfig, horizon: int) -> optax.GradientTransformation:
    """Clip by global norm, then the named optimizer on its schedule.

    Args:
      horizon: the steps that the learning-rate schedule is stretched over.
    """
    rate = schedules.learning_rate(cfg.schedule, horizon)
    optimizer = OPTIMIZERS[cfg.name](cfg, rate)
    if cfg.moment_dtype != "float32":
        optimizer = store_moments(optimizer, jnp.dtype(cfg.moment_dtype))
    return optax.chain(clip_by_global_norm(cfg.clip_norm), optimizer)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients so that their norm together is at most `max_norm`.

    optax's own divides every element, and again in each pass over the gradients that
    it is fused into: a fifth of AdamW's time on CPU.
    """

    def clip(updates: Any, params: Any) -> Any:
        del params
        scale = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates)

    return optax.stateless(clip)


def adamw(cfg: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with decay on `decayed` parameters only."""
    return optax.adamw(
        rate,
        cfg.beta1,
        cfg.beta2,
        cfg.epsilon,
        weight_decay=cfg.weight_decay,
        mask=decayed,
    )


def muon(cfg: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon on hidden matrices, `adamw` on embedding, head, router and norms.

    Updates are scaled to the RMS of AdamW's (arXiv 2502.16982, section 2.2), so that
    one learning rate and one decay serve both.
    """
    matrices = optax.contrib.muon(
        rate,
        beta=0.95,
        weight_decay=cfg.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrix_dims,
    )
    return optax.partition({"muon": matrices, "adamw": adamw(cfg, rate)}, _labels)


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def decayed(params: Any) -> Any:
    """True for what weight decay pulls to zero: all but the norms' scales."""
    return jax.tree.map_with_path(lambda path, _: _names(path)[-1] != "scale", params)


def matrix_dims(params: Any) -> Any:
    """Which dimensions of a parameter Muon takes as a matrix; None: it isn't Muon's.

    Kernels are [layers?, experts?, in, out...]: what is in front of the last input
    dimension is a batch of matrices, what follows it is one output.
    """
    dims = optax.contrib.MuonDimensionNumbers

    def classify(path: Any, x: jax.Array) -> Any:
        *modules, name = _names(path)
        if name in ("embedding", "head", "scale") or "router" in modules:
            return None
        outputs = 2 if _has_two_outputs(modules, name) else 1
        return dims(
            reduction_axis=x.ndim - 1 - outputs,
            output_axis=tuple(range(x.ndim - outputs, x.ndim)),
        )

    return jax.tree.map_with_path(classify, params)


def _labels(params: Any) -> Any:
    """The name of the optimizer that each parameter goes to."""

    def is_leaf(dims: Any) -> bool:
        return dims is None or isinstance(dims, optax.contrib.MuonDimensionNumbers)

    return jax.tree.map(
        lambda dims: "adamw" if dims is None else "muon",
        matrix_dims(params),
        is_leaf=is_leaf,
    )


def _has_two_outputs(modules: list[str], name: str) -> bool:
    """Kernels [..., in, 2, mlp] and [..., in, heads, per head]."""
    return "gate_up" in (name, *modules[-1:]) or modules[-1] in (
        "query",
        "query_up",
        "kv_up",
    )


def _names(path: Any) -> list[str]:
    return [key.key for key in path]


def store_moments(
    inner: optax.GradientTransformation, dtype: Any
) -> optax.GradientTransformation:
    """Keeps `inner`'s moments as `dtype` between steps; it computes in float32.

    DeepSeek-V3 keeps AdamW's moments in bfloat16 (arXiv 2412.19437, section 3.3.3).
    """

    def cast(state: Any, to: Any) -> Any:
        def leaf(path: Any, x: jax.Array) -> jax.Array:
            fields = {getattr(key, "name", None) for key in path}
            return x.astype(to) if fields & {"mu", "nu"} else x

        return jax.tree.map_with_path(leaf, state)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
