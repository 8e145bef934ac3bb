"""Moments, as exponential averages, of steps some of which aren't taken.

A step that isn't taken gives what it brings the weight 0, and what was there the weight
1. So scalars are chosen; if it were moments, element by element, old and new ones would
be read and written in passes of their own: 5% of a step on CPUs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmoe.config import OptimizerConfig

Taken = jax.Array | bool


def average(new: Any, old: Any, decay: float, is_taken: Taken) -> Any:
    """Returns `(1 - decay) * new + decay * old` of each leaf, or `old` as it is.

    What isn't taken must be finite all the same.
    """
    of_new = jnp.where(is_taken, jnp.float32(1 - decay), 0)
    of_old = jnp.where(is_taken, jnp.float32(decay), 1)
    return jax.tree.map(lambda x, m: of_new * x + of_old * m, new, old)


def age(count: jax.Array, is_taken: Taken) -> tuple[jax.Array, jax.Array]:
    """Returns how many steps were taken, int32; and that for corrections of bias."""
    count = count + jnp.asarray(is_taken, jnp.int32)
    return count, jnp.maximum(count, 1)


def scale_by_adam(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Adam (arXiv 1412.6980), with optax's state, and steps that may not be taken."""

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        is_taken: Taken = True,
        **_: Any,
    ) -> Any:
        del params
        square = jax.tree.map(jnp.square, updates)
        mu = average(updates, state.mu, cfg.beta1, is_taken)
        nu = average(square, state.nu, cfg.beta2, is_taken)
        count, steps = age(state.count, is_taken)
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + cfg.epsilon),
            optax.tree.bias_correction(mu, cfg.beta1, steps),
            optax.tree.bias_correction(nu, cfg.beta2, steps),
        )
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)
