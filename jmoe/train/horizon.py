"""What the schedules of a run do when it goes on, perhaps with other steps.

Learning rate, bias rate and MTP weight are planned over a horizon. If more steps meant
another horizon, they would jump: back up to the peak, at the end of a run. So the
horizon stays what the checkpoint was trained with, until the user writes down another
one, or that the last values hold beyond it; and is told what that does.
"""

import dataclasses
import pathlib

import jax.numpy as jnp

from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.store import Store
from jmoe.config import HorizonConfig, RunConfig
from jmoe.train import schedules
from jmoe.train.trained import CHECKPOINTS


def go_on(workdir: pathlib.Path, run: RunConfig) -> tuple[RunConfig, str | None]:
    """Returns `run` with the horizon to go on with, and what changes, in a line.

    Raises:
      ValueError: more steps than the horizon has, and no decision what to do there;
        shows what each of the two would.
    """
    with Store(workdir / CHECKPOINTS) as store:
        step = store.latest_step()
    if not step:
        return run, None  # of its schedules nothing has happened yet
    recorded = workdirs.read_run(workdir)
    given, steps = run.schedule, run.schedule.steps
    # A decision to hold stays as long as the horizon that it was taken for.
    kept = recorded.schedule if given == HorizonConfig() else given
    if steps is None:
        steps = recorded.horizon
    if run.train.steps > steps and kept.beyond == "refuse":
        raise ValueError(_choice(recorded, run, step))
    if steps != run.train.steps:
        run = _planned(run, HorizonConfig(steps=steps, beyond=kept.beyond))
    return run, _change(recorded, run, step)


def values(run: RunConfig, step: int) -> dict[str, float]:
    """Returns the scheduled values of optimizer step `step`, by name."""
    train, steps = run.train, run.horizon
    of_step = {
        "learning rate": schedules.learning_rate(run.optimizer.schedule, steps),
        "bias rate": schedules.stepwise(train.bias_rate, steps),
    }
    if run.model.mtp_depth:
        of_step["MTP weight"] = schedules.stepwise(train.mtp_weight, steps)
    return {name: float(value(jnp.int32(step))) for name, value in of_step.items()}


def _change(recorded: RunConfig, run: RunConfig, step: int) -> str | None:
    """Says what is otherwise than planned, at this step or beyond the horizon."""
    before, after = values(recorded, step), values(run, step)
    plans = [
        f"{of.horizon} steps" + ", then held" * (of.train.steps > of.horizon)
        for of in (recorded, run)
    ]
    if before == after and plans[0] == plans[1]:
        return None
    return (
        f"Schedules over {plans[1]} (were over {plans[0]}): at step {step} "
        f"{_moves(before, after)}."
    )


def _choice(recorded: RunConfig, run: RunConfig, step: int) -> str:
    """Returns the two ways to go on beyond the recorded horizon."""
    steps, horizon = run.train.steps, recorded.horizon
    last = values(recorded, horizon - 1)
    held = ", ".join(f"{name} {value:.3g}" for name, value in last.items())
    anew = values(_planned(run, HorizonConfig(steps=steps)), step)
    return (
        f"train.steps={steps} goes beyond the {horizon} steps that the schedules of "
        "this run were planned over. Write down what becomes of them:\n"
        f"  --set schedule.beyond=hold: they stay as they end: {held}\n"
        f"  --set schedule.steps={steps}: they are planned anew: at step {step} "
        f"{_moves(values(recorded, step), anew)}"
    )


def _planned(run: RunConfig, schedule: HorizonConfig) -> RunConfig:
    return dataclasses.replace(run, schedule=schedule)


def _moves(before: dict[str, float], after: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {before[name]:.3g} -> {after[name]:.3g}" for name in before
    )
