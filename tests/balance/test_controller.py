"""What is decided about load is stable, has its reason, and pays.

Shapes: L MoE layer, E expert, P device.
"""

import copy
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import placement
from jmoe.balance.controller import ControllerState, System, Window, check, decide
from jmoe.config.controller import ACTIONS, SERVING, TRAINING, ControllerConfig

SYSTEM = System(devices=4)
LIMITS = {"device_rows": 100, "step_seconds": 1.0, "wait_seconds": 10.0}
EVERYTHING = ControllerConfig(actions=ACTIONS, cool_down=3, **LIMITS)
EVEN_LE = np.full((2, 8), 64)


def state(replicas: int = 8) -> ControllerState:
    return ControllerState(placement.place(EVEN_LE, replicas, 1, 1, SYSTEM.devices))


def window(count_LE=EVEN_LE, **changes) -> Window:
    found = Window(steps=64, seconds=6.4, slowest=0.1, count_LE=count_LE)
    return found._replace(**changes)


def run(cfg, windows, begin=None) -> list[list]:
    """The decisions behind each window; windows may be functions of the switches."""
    now, found = begin or state(), []
    for each in windows:
        measured = each(now.switches) if callable(each) else each
        now, decisions = decide(cfg, SYSTEM, now, measured)
        found.append(decisions)
    return found


def kinds(decisions) -> list[str]:
    return [decision.kind for each in decisions for decision in each]


counts = st.lists(st.integers(0, 10_000), min_size=16, max_size=16).map(
    lambda values: np.reshape(values, (2, 8))
)
seconds = st.floats(0.001, 3.0)


@settings(max_examples=30, deadline=None)
@given(counts, seconds, st.floats(0, 200), st.floats(0, 30))
def test_a_constant_load_is_answered_once(count_LE, slowest, waiting, wait):
    same = window(count_LE, slowest=slowest, waiting=waiting, wait=wait)
    found = run(EVERYTHING, [same] * 20)
    assert len(kinds(found)) == len(set(kinds(found)))
    assert not any(found[1:])


@settings(deadline=None)
@given(st.floats(0.1, 3.0), st.floats(0.1, 1.0))
def test_a_load_that_its_answer_relieves_is_answered_once(slowest, relief):
    def measured(switches):
        is_on = "fp8" in switches and switches["fp8"].is_on
        return window(slowest=slowest * (relief if is_on else 1))

    assert len(kinds(run(EVERYTHING, [measured] * 20))) == (slowest > 0.9)


@settings(deadline=None)
@given(st.lists(st.floats(0.71, 0.89), min_size=20, max_size=20), st.booleans())
def test_between_the_thresholds_nothing_changes(gauges, is_on):
    loads = [window(slowest=gauge) for gauge in gauges]
    first = [window(slowest=0.95)] if is_on else []
    assert len(kinds(run(EVERYTHING, first + loads))) == is_on


def test_what_began_ends_when_the_load_is_gone():
    loads = [window(slowest=s, waiting=20.0, wait=14.0) for s in (0.95, 0.95)]
    loads += [window(slowest=0.1)] * 4
    found = run(dataclasses.replace(EVERYTHING, actions=("fp8", "admit")), loads)
    assert [d.value for d in found[0]] == [True, 10]  # who wait for 7 of 14 s
    assert [d.value for d in found[3]] == [False, None]
    assert kinds(found) == ["fp8", "admit"] * 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(counts, seconds), min_size=12, max_size=12))
def test_decisions_of_a_kind_are_apart(loads):
    found = run(EVERYTHING, [window(x, slowest=s) for x, s in loads])
    for kind in ACTIONS:
        at = [i for i, each in enumerate(found) if kind in kinds([each])]
        assert all(np.diff(at) >= EVERYTHING.cool_down)


@settings(deadline=None)
@given(counts, seconds)
def test_the_same_is_decided_of_the_same_and_nothing_given_is_changed(count_LE, slow):
    before, load = state(), window(count_LE, slowest=slow)
    kept = copy.deepcopy((before, load))
    first, again = (decide(EVERYTHING, SYSTEM, before, load) for _ in range(2))
    assert repr(first) == repr(again) and repr(kept) == repr((before, load))


SKEWED_LE = np.array([[900, 800, 30, 30, 30, 30, 30, 30], [40, 40, 40, 40, 9, 9, 9, 9]])


def test_experts_are_placed_so_that_devices_do_alike_and_the_reason_has_numbers():
    begin = state(replicas=12)
    after, (decision,) = decide(SERVING, SYSTEM, begin, window(SKEWED_LE))
    assert decision.kind == "place" and decision.value is after.placement
    busiest = [
        placement.device_load(SKEWED_LE, x, SYSTEM.devices).max(-1).sum()
        for x in (begin.placement, after.placement)
    ]
    assert busiest[1] < busiest[0] / 1.5
    excess = busiest[0] * 4 / SKEWED_LE.sum()
    assert f"{excess:.2f} of the mean load, above 1.10" in decision.reason
    moves = placement.moves(begin.placement, after.placement).sum()
    assert decision.change.startswith(f"{moves} slots hold another expert")


def test_experts_stay_where_moves_take_longer_than_they_win():
    free, begin = window(SKEWED_LE), state(replicas=12)
    after, (decision,) = decide(SERVING, SYSTEM, begin, free)
    busy, then = (
        placement.device_load(SKEWED_LE, x.placement, SYSTEM.devices).max(-1).sum()
        for x in (begin, after)
    )
    step_seconds = free.seconds / free.steps
    won = (1 - then / busy) * SERVING.expert_share * step_seconds
    won_by_move = won * SERVING.horizon_steps / int(decision.change.split()[0])
    for factor, count in ((0.98, 1), (1.02, 0)):
        load = free._replace(move_seconds=factor * won_by_move)
        assert len(decide(SERVING, SYSTEM, begin, load)[1]) == count


def test_choices_are_dropped_above_the_threshold_only_where_that_is_allowed():
    cfg = ControllerConfig(actions=("drop",), device_rows=100)
    busy_LE = np.full((2, 8), 64 * 9)
    busy_LE[0, state().placement.physical_to_logical[0, :2]] = 64 * 46, 64 * 45
    (decision,) = run(cfg, [window(busy_LE)])[0]
    assert (decision.kind, decision.value) == ("drop", 90)
    assert "91 choices" in decision.reason
    assert not run(cfg, [window(busy_LE - 64)])[0]
    assert "drop" not in SERVING.actions


@settings(deadline=None)
@given(counts, seconds)
def test_training_decides_nothing_unless_it_is_told_to(count_LE, slowest):
    limited = dataclasses.replace(TRAINING, **LIMITS)
    assert not kinds(run(limited, [window(count_LE, slowest=slowest)] * 3))


@pytest.mark.parametrize(("shape", "told"), [((3, 8), "3 of 8"), ((2, 16), "2 of 16")])
def test_a_placement_for_another_model_is_refused(shape, told):
    with pytest.raises(ValueError, match=f"2 MoE layers of 8 experts.*{told}"):
        decide(SERVING, SYSTEM, state(), window(np.ones(shape, int)))


def test_a_placement_for_other_devices_is_refused():
    with pytest.raises(ValueError, match="8 slots must divide over 3 devices"):
        check(state().placement, (2, 8), System(devices=3))
