"""The benchmark of a step on a mesh compares steps that are the same."""

import dataclasses

import numpy as np
import pytest

from experiments.benchmarks import mesh, ours
from experiments.benchmarks.workers import Turn
from jmoe.config import override
from tests.scripts.test_bench import SMALL

WORKLOAD = dataclasses.replace(
    SMALL, batch=8, model=override(SMALL.model, ["moe.router.num_experts=16"])
)


def test_both_exchanges_train_as_one_device_does():
    losses = [ours.train_step(WORKLOAD)["step"]()]
    for exchange in mesh.EXCHANGES:
        step = ours.train_step(mesh.on_mesh(WORKLOAD, exchange), mesh.MESH)["step"]
        losses.append(step())
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-5)


def test_the_mesh_is_held_to_one_and_a_half_times_one_device():
    def turns(*seconds):
        return [Turn([9.0, s], 0.0, 2**30, 0) for s in seconds]

    measured = {
        "one": turns(1, 2, 4),
        "padded": turns(2, 3, 6),
        "gather": turns(3, 6, 9),
    }
    found = {figure.name: figure for figure in mesh.figures(measured, WORKLOAD)}
    ratio = found["training step, padded / one"]
    assert (ratio.value, ratio.met) == (pytest.approx(1.5), True)
    assert found["training step, padded / gather"].value == pytest.approx(2 / 3)
    assert found["peak memory, gather"].value == 1.0
