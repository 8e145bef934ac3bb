"""A pilot does what a controller decides, between steps, and no token is other."""

import dataclasses

import numpy as np
import pytest

from jmoe.balance import placement
from jmoe.config.controller import ControllerConfig
from jmoe.decode.engine import Engine, QueueFull
from jmoe.decode.pilot import Pilot
from jmoe.decode.requests import Sampling
from tests.decode.placed import DEVICES, any_placement, completed, engine
from tests.decode.test_step import LIMITS

RESTLESS = ControllerConfig(
    window_steps=8,
    cool_down=1,
    uneven_above=0.02,
    uneven_below=0.01,
    horizon_steps=10**9,
)


def test_on_a_pipeline_a_pilot_places_experts_as_they_are_busy(cfg):
    on_mesh, _, watcher = engine(cfg)
    placing, told, counts = on_mesh.programs.placing, [], []
    placing.begin(any_placement(on_mesh.cfg, seed=1))
    on_mesh.programs.advance(placing.steps_left)
    want, before = completed(on_mesh), placing.placement
    pilot = Pilot(RESTLESS, told.append)
    pilot.take(on_mesh)

    def observe(stats):
        counts.append(stats.count_LE)
        pilot(stats)

    watcher.observe = observe
    assert completed(on_mesh) == want
    assert [action.kind for action in told][:1] == ["place"]
    assert "of the mean load, above 1.02" in told[0].reason
    assert any("have arrived" in action.reason for action in told)
    load_LE = np.sum(counts, axis=0)
    busiest = [
        placement.device_load(load_LE, x, DEVICES).max(-1).sum()
        for x in (before, placing.placement)
    ]
    assert busiest[1] < busiest[0]


def test_a_pilot_lets_fewer_requests_wait_while_they_wait_for_too_long(cfg, variables):
    told: list = []
    asked = ControllerConfig(wait_seconds=1e-6, window_steps=2, cool_down=1)
    pilot = Pilot(asked, told.append)
    limits = dataclasses.replace(LIMITS, queue=20)
    one = Engine(cfg, variables, limits, observe=pilot)
    pilot.take(one)
    for _ in range(limits.slots + 10):
        one.submit([1, 2, 3], Sampling(max_new_tokens=9))
        one.step()
    while one.most_waiting == limits.queue:
        one.step()
    assert told[0].kind == "admit" and 1 <= one.most_waiting < 20
    with pytest.raises(QueueFull, match=f"queue={one.most_waiting} "):
        for _ in range(20):
            one.submit([1], Sampling())
    while one.most_waiting < limits.queue:
        one.step()
        one.submit([1], Sampling(max_new_tokens=1)) if one.is_idle else None
    assert told[-1].value is None


def test_a_pilot_refuses_what_no_engine_does():
    with pytest.raises(ValueError, match="actions has 'fp8'.*'place' and 'admit'"):
        Pilot(ControllerConfig(actions=("place", "fp8")), print)
