"""The benchmark of pipelines runs the step it says, and its tasks add up to one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import pipeline
from experiments.benchmarks.workers import Turn
from jmoe.config import override
from jmoe.config.mesh import SCHEDULES
from jmoe.nn.model import Transformer, make_variables
from jmoe.parallel.schedule import Costs
from tests.scripts.test_bench import SMALL

WORKLOAD = dataclasses.replace(
    SMALL,
    batch=pipeline.MICROBATCHES,
    model=override(SMALL.model, ["num_layers=4", "layer_loop=scan"]),
)


def test_a_schedule_and_the_tasks_alone_are_of_one_devices_loss():
    measured = pipeline.measure(WORKLOAD, rounds=1, schedules=("dualpipe",))
    step, alone = measured["dualpipe"]
    tokens_BT = WORKLOAD.token_ids()
    model = Transformer(WORKLOAD.model)

    def loss(variables):
        logits = model.apply(variables, tokens_BT[:, :-1]).logits
        picked = jnp.take_along_axis(logits, tokens_BT[:, 1:, None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    want = jax.jit(loss)(jax.jit(functools.partial(make_variables, model, 0))())
    np.testing.assert_allclose(step[0].result, want, rtol=1e-5)
    seconds = alone[0].result
    for kind in "FBW":
        assert len(seconds[kind]) == pipeline.RANKS
    for kind in ("enter", "lose", "enter, backward"):
        assert len(seconds[kind]) == 1


def test_a_step_is_held_to_its_tasks_and_ticks_are_timed_by_them():
    def turn(seconds, result=None):  # a turn's last step counts
        return Turn([2 * seconds, seconds], result, 2**30, 0)

    alone = {"F": [1, 3], "B": [2, 2], "W": [1, 1], "enter": [0.5], "lose": [0.5]}
    tasks = pipeline.MICROBATCHES * 11
    beside = [turn(9.0, alone)] * 2
    steps = {name: [turn(tasks), turn(1.1 * tasks)] for name in SCHEDULES}
    steps["dualpipe"] = [turn(1.2 * tasks)] * 2
    measured = {name: pipeline.Measured(s, beside) for name, s in steps.items()}
    found = {figure.name: figure for figure in pipeline.figures(measured)}
    assert found["tasks alone"].value == tasks
    ratio = found["step, gpipe / tasks alone"]
    assert (ratio.value, ratio.met) == (pytest.approx(1.05), True)
    assert not found["step, dualpipe / tasks alone"].met
    assert found["peak memory, tasks alone"].value == 1.0
    # Of two stages in place of one, a task takes half as long.
    ticks = pipeline.make_ticks("dualpipe")
    assert pipeline.stage_share(ticks) == 1.0
    assert pipeline.stage_share(pipeline.make_ticks("dualpipe_v")) == 0.5
    costs = Costs(forward=2.0, backward=3.0, weight=1.0)
    assert found["time in ticks, dualpipe"].value == ticks.time(costs)
    assert found["ticks, dualpipe"].value == ticks.count
