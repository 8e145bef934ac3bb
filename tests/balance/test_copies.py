"""On the way to any placement every expert is somewhere, and a device gets one a step.

Shapes: R place, P device, E expert.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import copies


@st.composite
def placements(draw):
    """Two placements of the same experts in as many places, and the devices."""
    devices = draw(st.sampled_from([1, 2, 3, 4, 8]))
    places = devices * draw(st.integers(1, 5))
    experts = draw(st.integers(1, places))
    found = []
    for _ in range(2):
        rest = st.lists(
            st.integers(0, experts - 1),
            min_size=places - experts,
            max_size=places - experts,
        )
        expert_R = [*range(experts), *draw(rest)]
        found.append(np.array(draw(st.permutations(expert_R))))
    return *found, devices


def by_device(expert_R, devices) -> list[list[int]]:
    return np.sort(expert_R.reshape(devices, -1), axis=1).tolist()


@settings(max_examples=200, deadline=None)
@given(placements())
def test_every_expert_is_somewhere_at_each_step_and_all_arrive(drawn):
    expert_R, wanted_R, devices = drawn
    held_R, kept_R = expert_R, expert_R.copy()
    found = copies.steps(expert_R, wanted_R, devices)
    for step in found:
        gets_P = step.target_P < len(held_R)
        assert gets_P.any()
        target_X, source_X = step.target_P[gets_P], step.source_P[gets_P]
        assert (target_X // (len(held_R) // devices) == np.flatnonzero(gets_P)).all()
        after_R = held_R.copy()
        after_R[target_X] = held_R[source_X]
        np.testing.assert_array_equal(step.expert_R, after_R)
        assert set(after_R) == set(expert_R)
        held_R = after_R
    assert by_device(held_R, devices) == by_device(wanted_R, devices)
    np.testing.assert_array_equal(expert_R, kept_R)


@settings(deadline=None)
@given(placements())
def test_no_weights_move_twice_nor_to_who_has_them(drawn):
    expert_R, wanted_R, devices = drawn
    found = copies.steps(expert_R, wanted_R, devices)
    moves = sum((step.target_P < len(expert_R)).sum() for step in found)
    before, after = (by_device(x, devices) for x in (expert_R, wanted_R))
    needed = 0
    for had, has in zip(before, after, strict=True):
        for expert in set(has):
            needed += max(has.count(expert) - had.count(expert), 0)
    assert moves == needed
    assert not copies.steps(expert_R, expert_R, devices)


def test_experts_that_change_devices_in_a_circle_do_so_in_one_step():
    expert_R = np.arange(4)
    (step,) = copies.steps(expert_R, np.roll(expert_R, 1), devices=4)
    assert step.source_P.tolist() == [3, 0, 1, 2]
    assert step.target_P.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("wanted", "devices", "message"),
    [
        ([0, 1, 1, 2], 2, "3 experts in 4 places is no other one of 4 experts"),
        ([0, 1, 2, 3, 0, 1], 2, "4 experts in 6 places is no other one of 4 experts"),
        ([3, 2, 1, 0], 3, "4 places must divide over 3 devices"),
    ],
)
def test_what_is_no_other_placement_is_refused(wanted, devices, message):
    with pytest.raises(ValueError, match=message):
        copies.steps(np.arange(4), np.array(wanted), devices)
