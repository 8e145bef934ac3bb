"""Visits, capacity and drops against counting one by one."""

import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import dropping
from jmoe.config import RouterConfig

PLAIN = RouterConfig(num_experts=16, top_k=4)
V3 = RouterConfig(num_experts=256, top_k=8, num_groups=8, groups_per_token=4)


def random_choices(router, tokens, seed=0):
    """Distinct choices, within as many groups as it may, as a router makes them."""
    rng = np.random.default_rng(seed)
    expert_NK = np.empty((tokens, router.top_k), np.int32)
    for choices_K in expert_NK:
        groups = rng.choice(router.num_groups, router.most_groups, replace=False)
        reachable = groups[:, None] * router.group_size + np.arange(router.group_size)
        choices_K[:] = rng.choice(reachable.ravel(), router.top_k, replace=False)
    return expert_NK, rng.random(expert_NK.shape, np.float32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def visits_of(expert_NK, gate_NK, router, peers):
    return dropping.find_visits(expert_NK, gate_NK, router, peers)


@pytest.mark.parametrize(
    ("router", "peers", "most"),
    [
        (PLAIN, 2, 2),  # no more than there are devices
        (PLAIN, 16, 4),  # nor than choices
        (V3, 8, 4),  # a group is a device
        (V3, 4, 4),  # a device has two groups, but they may be on different ones
        (V3, 16, 8),  # a group lies on two devices
        (V3, 256, 8),
        (dataclasses.replace(V3, kind="hash"), 8, 8),  # whatever the groups
        (dataclasses.replace(V3, hash_layers=1), 8, 8),
        (RouterConfig(num_experts=8, top_k=4, num_groups=4, groups_per_token=2), 4, 2),
        # Groups of 3 beside devices of 4: the second group lies on two devices.
        (RouterConfig(num_experts=12, top_k=3, num_groups=4), 3, 2),
    ],
)
def test_the_most_visits_are_bounded_by_choices_devices_and_groups(router, peers, most):
    assert dropping.most_visits(router, peers) == most
    expert_NK, _ = random_choices(router, 2000)
    peer_NK = expert_NK // (router.num_experts // peers)
    assert max(len(set(peers_K)) for peers_K in peer_NK.tolist()) == most


ALL_OF_ONE_GROUP = RouterConfig(num_experts=16, top_k=4, num_groups=4)
ALL_OF_TWO_GROUPS = RouterConfig(
    num_experts=16, top_k=4, num_groups=8, groups_per_token=2
)
MISSED_BY_V3 = (
    math.comb(7, 4) + math.comb(7, 3) * Fraction(math.comb(96, 8), math.comb(128, 8))
) / math.comb(8, 4)


MISSED_BY_ANY = Fraction(math.comb(224, 8), math.comb(256, 8))


@pytest.mark.parametrize(
    ("router", "peers", "want"),
    [
        (RouterConfig(num_experts=16, top_k=1), 8, 1),
        (RouterConfig(num_experts=16, top_k=16), 8, 8),
        (PLAIN, 1, 1),
        (PLAIN, 16, 4),  # each of its choices is another device's
        (PLAIN, 8, 8 * (1 - Fraction(math.comb(14, 4), math.comb(16, 4)))),
        (ALL_OF_ONE_GROUP, 4, 1),
        (ALL_OF_ONE_GROUP, 8, 2),
        (ALL_OF_TWO_GROUPS, 8, 2),
        (V3, 8, 8 * (1 - MISSED_BY_V3)),
        (V3, 256, 8),
        (dataclasses.replace(V3, kind="hash"), 8, 8 * (1 - MISSED_BY_ANY)),
    ],
)
def test_balanced_visits_have_closed_forms(router, peers, want):
    assert dropping.expected_visits(router, peers) == want


@settings(deadline=None)
@given(data=st.data())
def test_balanced_visits_are_the_mean_over_all_choices_that_a_token_can_make(data):
    """Groups need not end where devices do."""
    group_size, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    experts = group_size * groups
    chosen_groups = data.draw(st.integers(1, groups))
    router = RouterConfig(
        num_experts=experts,
        top_k=data.draw(st.integers(1, chosen_groups * group_size)),
        num_groups=groups,
        groups_per_token=chosen_groups,
        group_score="max",
    )
    divisors = [n for n in range(1, experts + 1) if experts % n == 0]
    peers = data.draw(st.sampled_from(divisors))
    visits = []
    for chosen in itertools.combinations(range(groups), chosen_groups):
        reachable = [e for e in range(experts) if e // group_size in chosen]
        for expert_K in itertools.combinations(reachable, router.top_k):
            visits.append(len({e // (experts // peers) for e in expert_K}))
    want = Fraction(sum(visits), len(visits))
    assert dropping.expected_visits(router, peers) == want


def test_room_is_a_factor_of_the_balanced_load_and_never_more_than_everything():
    one = RouterConfig(num_experts=16, top_k=1)
    assert dropping.send_capacity(1.0, 128, one, 8) == 128 // 8
    assert dropping.receive_capacity(1.0, 128, one, 8) == 128
    assert dropping.send_capacity(1.25, 128, ALL_OF_TWO_GROUPS, 8) == 40
    assert dropping.receive_capacity(1.25, 128, ALL_OF_TWO_GROUPS, 8) == 320
    assert dropping.send_capacity(1.0, 100, PLAIN, 8) == 45  # 3.6 visits of a token
    assert dropping.send_capacity(1.0, 101, PLAIN, 8) == 46  # 45.45, rounded up
    # In floating point, 1.1 x 50 is above 55.
    assert dropping.send_capacity(1.1, 200, ALL_OF_TWO_GROUPS, 8) == 55
    for capacity, most in (
        (dropping.send_capacity, 128),
        (dropping.receive_capacity, 1024),
    ):
        assert capacity(None, 128, PLAIN, 8) == most
        assert capacity(9.0, 128, PLAIN, 8) == most
        assert capacity(2.0, 128, PLAIN, 8) < most


@pytest.mark.parametrize("peers", [1, 4, 16])
def test_a_token_visits_each_peer_of_its_choices_once(peers):
    expert_NK, gate_NK = random_choices(PLAIN, 50)
    expert_NK[7, 1:3] = PLAIN.num_experts  # nobody
    expert_NK[8] = PLAIN.num_experts
    visits = visits_of(expert_NK, gate_NK, PLAIN, peers)
    for token, peer_K in enumerate((expert_NK // (16 // peers)).tolist()):
        want = sorted(set(peer_K) - {peers})
        got = [list(np.asarray(of[token])) for of in visits]
        assert got[0] == want + [peers] * (len(got[0]) - len(want))
        assert got[2][: len(want)] == [peer_K.count(p) for p in want]
        gates = [gate_NK[token][np.equal(peer_K, p)].sum() for p in want]
        np.testing.assert_allclose(got[1][: len(want)], gates, rtol=1e-6)
    count_P = dropping.count_visits(visits, peers)
    assert count_P.tolist() == [(visits.peer_NV == p).sum() for p in range(peers)]
    nowhere_NV = visits.peer_NV == peers
    assert not visits.choices_NV[nowhere_NV].any()


RANK = {
    name: jax.jit(order, static_argnums=1)
    for name, order in dropping.DROP_ORDERS.items()
}
SORT_KEYS = {
    "score": lambda visit: (-visit["gate"], visit["token"]),
    "position": lambda visit: visit["token"],
}


@pytest.mark.parametrize("order", dropping.DROP_ORDERS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_each_peers_visits_are_ranked_by_the_order(order, data):
    peers = data.draw(st.sampled_from([2, 8]))
    expert_NK, gate_NK = random_choices(PLAIN, 12, data.draw(st.integers(0, 999)))
    expert_NK[data.draw(st.integers(0, 12)) :] = PLAIN.num_experts  # nobody
    coarse = data.draw(st.sampled_from([1, 2, 256]))  # few values: many ties
    gate_NK = np.ceil(gate_NK * coarse) / coarse
    visits = visits_of(expert_NK, gate_NK, PLAIN, peers)
    rank_NV = np.asarray(RANK[order](visits, peers))
    assert rank_NV.dtype == np.int32
    for peer in range(peers):
        found = [
            {"token": t, "gate": visits.gate_NV[t, v], "rank": rank_NV[t, v]}
            for t, v in np.argwhere(np.asarray(visits.peer_NV) == peer)
        ]
        found.sort(key=SORT_KEYS[order])
        assert [visit["rank"] for visit in found] == list(range(len(found)))


def test_dropped_choices_are_those_of_visits_that_exist_and_are_not_kept():
    expert_NK, gate_NK = random_choices(PLAIN, 30)
    expert_NK[3] = PLAIN.num_experts
    visits = visits_of(expert_NK, gate_NK, PLAIN, 4)
    is_kept_NV = np.random.default_rng(0).random(visits.peer_NV.shape) < 0.5
    want = 0
    for token, peer_K in enumerate((expert_NK // 4).tolist()):
        kept = np.asarray(visits.peer_NV)[token][is_kept_NV[token]]
        want += sum(peer < 4 and peer not in kept for peer in peer_K)
    got = dropping.dropped_choices(visits, jnp.asarray(is_kept_NV))
    assert got == want > 0 and got.dtype == jnp.int32


SHARE = jax.jit(dropping.share_capacity)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=4, max_size=4), st.integers(0, 90))
def test_capacity_is_shared_evenly_and_used_up(counts, capacity):
    allowed = np.asarray(SHARE(np.array(counts, np.int32), capacity))
    assert allowed.sum() == min(capacity, sum(counts))
    assert (0 <= allowed).all() and (allowed <= counts).all()
    unserved = allowed < counts
    if unserved.any():
        # Who is refused something has as much as anyone, but for what is left over,
        # which the first of them get.
        assert allowed.max() - allowed[unserved].min() <= 1
        wants_more = allowed[np.asarray(counts) > allowed[unserved].min()]
        assert (np.diff(wants_more) <= 0).all()


PLACES, DEVICES = 8, 4


@st.composite
def choices(draw):
    """Places of tokens' choices, some of them nobody's, with gates and limits."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    place_NK = rng.permuted(np.tile(np.arange(PLACES), (12, 1)), axis=1)[:, :3]
    place_NK[rng.random(12) < 0.2] = PLACES
    allowed_P = rng.integers(0, 12, DEVICES)
    gate_NK = rng.random((12, 3))
    return place_NK.astype(np.int32), gate_NK.astype(np.float32), allowed_P


@settings(deadline=None, max_examples=40)
@given(choices())
def test_a_device_keeps_its_most_important_choices_and_every_tokens_best(drawn):
    place_NK, gate_NK, allowed_P = drawn
    given = map(jnp.asarray, drawn)
    kept_NK = np.asarray(dropping.least_important_dropped(*given, PLACES))
    is_best_NK = np.arange(3) == gate_NK.argmax(1)[:, None]
    is_real_NK = place_NK < PLACES
    for device, allowed in enumerate(allowed_P):
        here_NK = place_NK // (PLACES // DEVICES) == device
        order = np.argsort(-np.where(is_best_NK, np.inf, gate_NK)[here_NK])
        want = np.isin(np.arange(here_NK.sum()), order[:allowed]) | is_best_NK[here_NK]
        np.testing.assert_array_equal(kept_NK[here_NK] < PLACES, want)
    stays_NK = kept_NK < PLACES
    np.testing.assert_array_equal(kept_NK[stays_NK], place_NK[stays_NK])
    assert stays_NK.any(1)[is_real_NK.all(1)].all()
