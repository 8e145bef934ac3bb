"""Homes of experts, and rounds of moves, carried out in NumPy.

Shapes: L layer, E expert or place, P device.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.balance import dropping
from jmoe.balance import homes as subject
from jmoe.config import RouterConfig

L, E, P = 2, 16, 4
SIZE = E // P
ROUTER = RouterConfig(num_experts=E, top_k=2)
LIMITED = RouterConfig(num_experts=E, top_k=6, num_groups=4, groups_per_token=2)


def shuffled(seed) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.permuted(subject.in_order(L, E), axis=1)


def in_rounds(moves, home_E, layer, devices):
    """Where experts are after the rounds, of which none may be overfull."""
    home_E = home_E.copy()
    size = len(home_E) // devices
    for nth in range(moves.rounds_L[layer]):
        from_P, to_P = moves.from_LRP[layer, nth], moves.to_LRP[layer, nth]
        leaves, gets = from_P[from_P < E], to_P[to_P < E]
        assert len(np.unique(leaves // size)) == len(leaves) > 0
        assert sorted(leaves) == sorted(gets)
        assert (leaves // size != gets // size).all()
        home_E[[list(home_E).index(place) for place in leaves]] = gets
    return home_E


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from([2, P, 8]))
def test_every_expert_gets_home_in_as_few_rounds_as_the_busiest_device_needs(
    seed, other, devices
):
    home_LE, wanted_LE = shuffled(seed), shuffled(other)
    moves = subject.find_moves(home_LE, wanted_LE, devices)
    size = E // devices
    for layer in range(L):
        landed_E = in_rounds(moves, home_LE[layer], layer, devices)
        np.testing.assert_array_equal(landed_E // size, wanted_LE[layer] // size)
        source_E = moves.source_LE[layer][wanted_LE[layer]]
        np.testing.assert_array_equal(source_E, landed_E)
        assert moves.sorts_L[layer] == (landed_E != wanted_LE[layer]).any()
        leaves_E = home_LE[layer] // size != wanted_LE[layer] // size
        leaving_P = np.bincount(home_LE[layer][leaves_E] // size, minlength=devices)
        assert moves.rounds_L[layer] == leaving_P.max()


@given(st.integers(0, 999))
def test_devices_end_as_even_as_allowed_and_nobody_moves_who_need_not(seed):
    rng = np.random.default_rng(seed)
    load_TLE = rng.poisson(20 * rng.random((L, E)), (5, L, E))
    home_LE = shuffled(seed)
    found = subject.reassign(load_TLE, home_LE, ROUTER, P, 0.3)
    assert not found.moved_L[found.before_L <= 0.3].any()
    assert (found.after_L <= found.before_L).all()
    np.testing.assert_array_equal(np.sort(found.home_LE), subject.in_order(L, E))
    stays_LE = found.home_LE // SIZE == home_LE // SIZE
    np.testing.assert_array_equal(found.moved_L, (~stays_LE).sum(1))
    np.testing.assert_array_equal(found.home_LE[stays_LE], home_LE[stays_LE])
    moves = subject.find_moves(home_LE, found.home_LE, P)
    assert not moves.sorts_L.any()
    again = subject.reassign(load_TLE, found.home_LE, ROUTER, P, 0.3)
    assert not again.moved_L.any()


@pytest.mark.parametrize("devices", [2, 8])
def test_a_groups_experts_stay_on_so_few_devices_that_no_visit_is_missed(devices):
    rng = np.random.default_rng(devices)
    home_LE = subject.in_order(L, E)
    for _ in range(3):
        load_TLE = rng.integers(0, 100, (1, L, E)) ** 2
        home_LE = subject.reassign(load_TLE, home_LE, LIMITED, devices, 0.0).home_LE
    assert (home_LE != subject.in_order(L, E)).any()
    router = subject.keeping_groups(LIMITED, devices)
    bound = dropping.most_visits(router, devices)
    assert bound == dropping.most_visits(LIMITED, devices) < LIMITED.top_k
    for home_E in home_LE:
        device_GJ = home_E.reshape(4, -1) // (E // devices)
        visits = [len(np.unique(device_GJ[list(pair)])) for pair in np.ndindex(4, 4)]
        assert max(visits) <= bound


def test_homes_that_cannot_be_are_refused():
    home_LE = subject.in_order(L, E)
    with pytest.raises(ValueError, match="16 experts must divide over 3 devices"):
        subject.find_moves(home_LE, home_LE, 3)
    with pytest.raises(ValueError, match="wanted_LE must have each of the 16 places"):
        subject.find_moves(home_LE, np.zeros_like(home_LE), P)


def test_tokens_take_turns_between_the_copies_of_their_expert():
    home_EC = np.array([[0, 4, 5], [1, -1, -1], [2, 3, -1]], np.int32)
    expert_NK = np.repeat([[0, 1], [2, 3]], 6, axis=0)  # the last one is nobody
    for first in range(6):
        places = np.asarray(subject.of_choices(expert_NK, home_EC, first))
        assert np.bincount(places[:6, 0], minlength=6).tolist() == [2, 0, 0, 0, 2, 2]
        assert (places[:6, 1] == 1).all()
        assert np.bincount(places[6:, 0], minlength=6).tolist() == [0, 0, 3, 3, 0, 0]
        assert (places[6:, 1] == subject.num_places(home_EC)).all()
