"""AdamW (arXiv 1711.05101), by optax, or Muon (`jmoe.train.muon`)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmoe.config import OptimizerConfig
from jmoe.train import schedules
from jmoe.train.layout import Layout
from jmoe.train.muon import SCALES, scale_by_muon


def make_optimizer(
    cfg: OptimizerConfig, horizon: int, layout: Layout
) -> optax.GradientTransformation:
    """Clips by global norm, then runs the named optimizer on its schedule.

    Args:
      horizon: the steps that the learning-rate schedule is stretched over.
      layout: of the parameters, and what they are.
    """
    rate = schedules.learning_rate(cfg.schedule, horizon)
    optimizer = OPTIMIZERS[cfg.name](cfg, rate, layout)
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


def adamw(
    cfg: OptimizerConfig, rate: optax.Schedule, layout: Layout
) -> optax.GradientTransformation:
    """Returns AdamW, with decay of the parameters that decay."""

    def decays(params: Any) -> Any:
        return jax.tree.map(
            lambda record, x: x if _is_masked(x) else record.decays,
            layout.records,
            params,
        )

    return optax.adamw(
        rate,
        cfg.beta1,
        cfg.beta2,
        cfg.epsilon,
        weight_decay=cfg.weight_decay,
        mask=decays,
    )


def muon(
    cfg: OptimizerConfig, rate: optax.Schedule, layout: Layout
) -> optax.GradientTransformation:
    """Returns Muon on hidden matrices, `adamw` on embedding, head, router and norms."""
    matrices = optax.chain(
        scale_by_muon(layout, SCALES[cfg.muon_scale]),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    labels = jax.tree.map(
        lambda record: "muon" if record.is_hidden else "adamw",
        layout.records,
    )
    return optax.partition(
        {"muon": matrices, "adamw": adamw(cfg, rate, layout)}, labels
    )


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


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
