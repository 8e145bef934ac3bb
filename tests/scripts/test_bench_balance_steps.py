"""The benchmark of training steps compares runs that differ in their exchange alone."""

import dataclasses

import pytest

from experiments.benchmarks import balance_steps
from experiments.benchmarks.workers import Turn
from jmoe.config import override


def turns(loss: float, *seconds: list[float]) -> list[Turn]:
    result = {"loss": loss, balance_steps.TEMPORARIES: 3 * 2**20}
    return [Turn(times, result, 2**30, 0) for times in seconds]


def test_both_sides_train_the_same_but_for_the_exchange():
    runs = [balance_steps.run_with(side, 8) for side in balance_steps.SIDES]
    assert {run.model.moe.exchange.backend for run in runs} == {"balanced", "padded"}
    alike = [
        dataclasses.replace(
            run, model=override(run.model, ["moe.exchange.backend=padded"])
        )
        for run in runs
    ]
    assert alike[0] == alike[1]
    assert runs[0].mesh.num_devices == balance_steps.DEVICES
    assert runs[0].train.batch_size == 8 * balance_steps.DEVICES
    assert runs[0].model.moe.exchange.capacity_factor is None  # nothing is dropped


def test_steps_are_held_against_those_of_the_same_round():
    measured = {
        "balanced": turns(5.0, [9, 2, 2], [9, 3, 3], [9, 8, 8]),
        "padded": turns(5.0, [9, 2, 2], [9, 2, 2], [9, 4, 4]),
    }
    found = {figure.name: figure for figure in balance_steps.figures(8, measured)}
    ratio = found["training step, balanced / padded, 1,024 tokens a device"]
    assert (ratio.value, ratio.met) == (pytest.approx(1.5), False)
    memory = found["peak memory of training, padded, 1,024 tokens a device"]
    assert memory.value == 1.0
    memory = found["temporaries of a step, balanced, 1,024 tokens a device"]
    assert memory.value == 3.0
    assert balance_steps.apart(measured) == ()


def test_losses_that_part_are_wrong():
    measured = {"balanced": turns(5.0, [1]), "padded": turns(5.2, [1])}
    (flaw,) = balance_steps.apart(measured)
    assert "5.0000" in flaw and "5.2000" in flaw
