"""A pilot does what a controller decides, between steps, and no token is other."""

import concurrent.futures
import dataclasses
import re

import numpy as np
import pytest

from jmoe.balance import placement
from jmoe.config.controller import ControllerConfig
from jmoe.decode.engine import Engine
from jmoe.decode.pilot import Pilot
from jmoe.decode.requests import Sampling
from jmoe.decode.stats import ignore
from tests.decode.placed import (
    DEVICES,
    SPARE,
    completed,
    engine,
    fp8_engine,
    switching_engine,
)
from tests.decode.test_step import LIMITS

RESTLESS = ControllerConfig(
    window_steps=8,
    cool_down=1,
    uneven_above=0.02,
    uneven_below=0.01,
    horizon_steps=10**9,
)


class AtOnce(concurrent.futures.Executor):
    """Calls what it is given, while whoever gives it waits."""

    def submit(self, fn, /, *args, **kwargs):
        future = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def uneven(model, load_LE) -> placement.Placement:
    """One with the busiest two of four groups on the first device, in each layer."""
    slots = []
    for load_E in load_LE:
        group_G = np.argsort(-load_E.reshape(4, -1).sum(1))
        expert_GJ = np.arange(len(load_E)).reshape(4, -1)[group_G]
        spare_PJ = expert_GJ[::2][:, : SPARE // 2]  # copies of one's own
        parts = np.split(expert_GJ.ravel(), 2), spare_PJ
        slots.append(np.concatenate([np.append(*x) for x in zip(*parts, strict=True)]))
    return placement.from_slots(np.stack(slots), model.moe.router.num_experts)


def test_on_a_pipeline_a_pilot_places_experts_as_they_are_busy(cfg):
    on_mesh, _, watcher = engine(cfg)
    placing, told, counts = on_mesh.programs.placing, [], []
    watcher.observe = lambda stats: counts.append(stats.count_LE)
    want, load_LE = completed(on_mesh), np.sum(counts, axis=0)
    placing.begin(placing.plan(uneven(on_mesh.cfg, load_LE)))
    on_mesh.programs.advance(placing.steps_left)
    before = placing.placement
    watcher.observe = pilot = Pilot(RESTLESS, told.append, AtOnce())
    pilot.take(on_mesh)
    assert completed(on_mesh) == want
    assert [action.kind for action in told][:1] == ["place"]
    assert "of the mean load, above 1.02" in told[0].reason
    assert any("have arrived" in action.reason for action in told)
    busiest = [
        placement.device_load(load_LE, x, DEVICES).max(-1).sum()
        for x in (before, placing.placement)
    ]
    assert busiest[1] < busiest[0]


def test_a_pilot_lets_fewer_requests_wait_while_they_wait_for_too_long(cfg, variables):
    told: list = []
    asked = ControllerConfig(wait_seconds=1e-6, window_steps=2, cool_down=1)
    pilot = Pilot(asked, told.append, AtOnce())
    limits = dataclasses.replace(LIMITS, queue=20)
    one = Engine(cfg, variables, limits, observe=pilot)
    pilot.take(one)
    for _ in range(20):
        one.submit([1, 2, 3], Sampling(max_new_tokens=9))
    for _ in range(STEPS):  # 20 requests take more
        one.step()
        if one.most_waiting < limits.queue:
            break
    assert told and told[0].kind == "admit" and 1 <= one.most_waiting < 20
    for _ in range(10 * STEPS):
        one.step()
        if one.most_waiting == limits.queue:
            break
        if one.is_idle:
            one.submit([1], Sampling(max_new_tokens=4))
    assert told[-1].value is None and one.most_waiting == limits.queue


STEPS = 40
SLOW = ControllerConfig(actions=("fp8",), step_seconds=1.0, window_steps=4, cool_down=1)


def test_a_pilot_lets_tokens_travel_in_fp8_while_steps_take_too_long(cfg, compilations):
    switching, watcher = switching_engine(cfg)
    wanted = {False: completed(switching), True: completed(fp8_engine(cfg))}
    told: list = []
    pilot = Pilot(SLOW, told.append, AtOnce())
    pilot.take(switching)
    compilations.clear()
    found = []
    for seconds in (0.5, 2.0, 0.8, 0.5):  # of each step
        watcher.observe = lambda stats, s=seconds: pilot(stats._replace(seconds=s))
        completed(switching)
        watcher.observe = ignore
        found.append(pilot.is_in_fp8)
        assert completed(switching) == wanted[found[-1]]
    assert found == [False, True, True, False] and not compilations
    assert [(action.kind, action.change) for action in told] == [
        ("fp8", "tokens travel in FP8"),
        ("fp8", "tokens travel as they are"),
    ]
    reasons = "|".join(action.reason for action in told)
    measured = "steps take up to .* s, .* of the limit"
    assert re.fullmatch(rf"{measured}, above 0.90\|{measured}, below 0.70", reasons)


def test_a_pilot_refuses_what_an_engine_was_not_made_for(cfg, variables):
    pilot = Pilot(ControllerConfig(actions=("drop",), device_rows=9), print)
    with pytest.raises(ValueError, match="actions has 'drop', .* without a limit"):
        pilot.take(Engine(cfg, variables, LIMITS, observe=pilot))
    pilot = Pilot(SLOW, print)
    with pytest.raises(ValueError, match="actions has 'fp8', .* without a second form"):
        pilot.take(fp8_engine(cfg))
