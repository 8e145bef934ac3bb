"""Learning rate, bias rates, MTP weight and batch size as functions of the step.

The first three are planned over a horizon of so many steps; beyond it they keep the
value of its last step. Fractions of it include the warm-up, so that what is to change
together does. They are traced (a step is an int32 scalar, results are float32 scalars),
so that a step's program is the same for all steps. The batch size decides shapes, so it
is computed on the host.

Shapes: L MoE layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmoe.config import ScheduleConfig, StepwiseConfig, TrainConfig

Schedule = Callable[[jax.Array], jax.Array]


def constant(cfg: ScheduleConfig, steps: int) -> optax.Schedule:
    """Returns the peak, all the way."""
    return optax.constant_schedule(cfg.peak)


def cosine(cfg: ScheduleConfig, steps: int) -> optax.Schedule:
    """Returns half a cosine from the peak to `end_fraction` of it."""
    return _half_cosine(cfg, steps - cfg.warmup_steps)


def wsd(cfg: ScheduleConfig, steps: int) -> optax.Schedule:
    """Returns a rate that is stable, then decays linearly at the end.

    Warm-up, stable, decay: MiniCPM, arXiv 2404.06395.
    """
    decay = max(round(cfg.decay_fraction * steps), 1)
    fall = optax.linear_schedule(cfg.peak, cfg.peak * cfg.end_fraction, decay)
    turn = steps - decay - cfg.warmup_steps
    return optax.join_schedules([constant(cfg, steps), fall], [turn])


def multi_step(cfg: ScheduleConfig, steps: int) -> optax.Schedule:
    """Returns DeepSeek-V3's (arXiv 2412.19437, section 4.2): see `ScheduleConfig`."""
    turns = [round(part * steps) - cfg.warmup_steps for part in cfg.boundaries]
    low = cfg.peak * cfg.end_fraction
    return optax.join_schedules(
        [
            constant(cfg, steps),
            _half_cosine(cfg, turns[1] - turns[0]),
            optax.constant_schedule(low),
            optax.constant_schedule(cfg.peak * cfg.tail_fraction),
        ],
        turns,
    )


def _half_cosine(cfg: ScheduleConfig, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(cfg.peak, max(steps, 1), cfg.end_fraction)


# What follows the warm-up, of `steps` the horizon; called with the steps since.
SCHEDULES = {
    "constant": constant,
    "cosine": cosine,
    "wsd": wsd,
    "multi_step": multi_step,
}


def learning_rate(cfg: ScheduleConfig, horizon: int) -> optax.Schedule:
    """Returns linear warm-up from 0, then the named schedule to the horizon's end."""
    after = SCHEDULES[cfg.name](cfg, horizon)
    if not cfg.warmup_steps:
        return _held(after, horizon)
    warmup = optax.linear_schedule(0.0, cfg.peak, cfg.warmup_steps)
    joined = optax.join_schedules([warmup, after], [cfg.warmup_steps])
    return _held(joined, horizon)


def stepwise(cfg: StepwiseConfig, horizon: int) -> Schedule:
    """Returns `first` for the steps before `switch * horizon`, `last` from there."""
    turn = round(cfg.switch * horizon)

    def value(step: jax.Array) -> jax.Array:
        return jnp.where(step < turn, jnp.float32(cfg.first), jnp.float32(cfg.last))

    return _held(value, horizon)


def bias_rates(cfg: TrainConfig, layers: Sequence[str], horizon: int) -> Schedule:
    """Returns the rate of each of these MoE layers' biases, float32 [L, 1].

    It is `bias_rate` times the factor of the last of `bias_rate_factors` whose pattern
    matches the layer's name, and `bias_rate` itself where none does.
    """

    def factor(name: str) -> float:
        found = [rate.factor for rate in cfg.bias_rate_factors if rate.matches(name)]
        return found[-1] if found else 1.0

    of_all = stepwise(cfg.bias_rate, horizon)
    factor_L1 = np.array([[factor(name)] for name in layers], np.float32)
    return lambda step: of_all(step) * factor_L1


def _held(schedule: Callable[..., Any], horizon: int) -> Callable[..., Any]:
    return lambda step: schedule(jnp.minimum(step, horizon - 1))


def microbatches(cfg: TrainConfig, step: int) -> int:
    """Returns how many microbatches step `step` takes: the batch-size ramp."""
    return next(count for begin, count in reversed(cfg.ramp.items()) if begin <= step)
