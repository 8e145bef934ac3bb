"""The parts of the search for a placement: what each keeps, and what each improves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import packing

EXAMPLES = settings(deadline=None, max_examples=60)


@st.composite
def pools(draw):
    """Weights, any slots with each expert in one at least, and how many devices."""
    num_devices, room = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, num_devices * room))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    more = rng.integers(0, num_experts, num_devices * room - num_experts)
    slot_R = rng.permutation(np.concatenate([np.arange(num_experts), more]))
    weight_E = draw(st.sampled_from([rng.random, lambda n: rng.integers(1, 5, n)]))
    return weight_E(num_experts) + 0.01, slot_R, num_devices


def by_device(slot_R, num_devices):
    return np.sort(slot_R.reshape(num_devices, -1), axis=1)


def descending_loads(weight_E, slot_R, num_devices):
    return sorted(packing.device_load(weight_E, slot_R, num_devices))[::-1]


@EXAMPLES
@given(pools(), st.integers(0, 99))
def test_filling_keeps_what_is_there_and_gives_each_expert_a_slot(pool, seed):
    weight_E, slot_R, num_devices = pool
    left_R = slot_R.copy()
    left_R[np.random.default_rng(seed).random(len(slot_R)) < 0.5] = packing.EMPTY
    if len(set(range(len(weight_E))) - {*left_R}) > (left_R == packing.EMPTY).sum():
        left_R[:] = packing.EMPTY
    filled_R = packing.fill(weight_E, left_R, num_devices, len(slot_R))
    is_there_R = left_R != packing.EMPTY
    assert (filled_R[is_there_R] == left_R[is_there_R]).all()
    assert set(filled_R.tolist()) == set(range(len(weight_E)))


def test_filling_stops_at_the_most_replicas_that_an_expert_may_have():
    weight_E, empty_R = np.array([100.0, 1, 2]), np.full(6, packing.EMPTY)
    for most, count in ((6, [4, 1, 1]), (2, [2, 2, 2])):
        filled_R = packing.fill(weight_E, empty_R, 2, most)
        assert np.bincount(filled_R).tolist() == count


@EXAMPLES
@given(pools())
def test_separating_leaves_no_repeat_that_can_be_avoided(pool):
    weight_E, slot_R, num_devices = pool
    avoidable = np.bincount(slot_R) <= num_devices
    got_R = packing.separate(weight_E, slot_R, num_devices)
    assert np.bincount(got_R).tolist() == np.bincount(slot_R).tolist()
    if avoidable.all():
        assert not packing.repeats(got_R, num_devices).any()
        assert all(len({*row}) == len(row) for row in got_R.reshape(num_devices, -1))


@EXAMPLES
@given(pools(), st.floats(1, 1.5), st.sampled_from(["exchange", "improve"]))
def test_loads_in_descending_order_only_fall_and_nothing_is_held_twice(
    pool, above, search
):
    weight_E, slot_R, num_devices = pool
    target = above * weight_E.sum() / num_devices
    if search == "exchange":
        got_R = packing.exchange(weight_E, slot_R, num_devices, target)
        assert (np.bincount(got_R) == np.bincount(slot_R)).all()
    else:
        got_R = packing.improve(weight_E, slot_R, num_devices, target, 50)
        assert set(got_R.tolist()) == set(range(len(weight_E)))
    before = descending_loads(weight_E, slot_R, num_devices)
    after = descending_loads(weight_E, got_R, num_devices)
    assert after[0] <= before[0] * (1 + 1e-12)
    assert np.array_equal(got_R, slot_R) == np.allclose(before, after, rtol=1e-12)
    repeats = [packing.repeats(x_R, num_devices).sum() for x_R in (got_R, slot_R)]
    assert repeats[0] <= repeats[1]


@EXAMPLES
@given(pools())
def test_a_balance_that_is_good_enough_is_left_alone(pool):
    weight_E, slot_R, num_devices = pool
    target = packing.device_load(weight_E, slot_R, num_devices).max()
    for got_R in (
        packing.exchange(weight_E, slot_R, num_devices, target),
        packing.improve(weight_E, slot_R, num_devices, target, 50),
    ):
        np.testing.assert_array_equal(got_R, slot_R)


@pytest.mark.parametrize(
    ("weight_E", "slots", "changed"),
    [
        ([6, 4, 2, 2], [0, 1, 2, 3], 2),  # two slots swapped
        ([8, 3, 1], [0, 1, 2, 1], 1),  # another slot holds the busy expert
        ([8, 5, 6, 1, 0.1], [0, 1, 2, 3, 0, 4], 1),  # the busy device holds another
    ],
)
def test_each_kind_of_change_is_found_and_changes_no_more_slots(
    weight_E, slots, changed
):
    weight_E, slot_R = np.array(weight_E, float), np.array(slots)
    got_R = packing.improve(weight_E, slot_R, len(slots) // 2, 0.0, 1)
    assert (got_R != slot_R).sum() == changed
    before, after = (
        packing.device_load(weight_E, x_R, len(slots) // 2) for x_R in (slot_R, got_R)
    )
    assert after[before.argmax()] < before.max()


@EXAMPLES
@given(pools(), st.integers(0, 99))
def test_a_packing_whose_devices_and_slots_are_permuted_needs_no_move(pool, seed):
    _, slot_R, num_devices = pool
    slot_R = packing.separate(np.ones(slot_R.max() + 1), slot_R, num_devices)
    rng = np.random.default_rng(seed)
    other_R = rng.permuted(rng.permutation(slot_R.reshape(num_devices, -1)), axis=1)
    got_R = packing.aligned(other_R.ravel(), slot_R, num_devices)
    if not packing.repeats(slot_R, num_devices).any():
        np.testing.assert_array_equal(got_R, slot_R)
    assert sorted(by_device(got_R, num_devices).tolist()) == sorted(
        by_device(slot_R, num_devices).tolist()
    )
