"""Placements: what holds for any load, beside DeepSeek's rule, and how little moves."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments.benchmarks import eplb
from jmoe.balance import packing, placement
from jmoe.balance.placement import Placement, device_load, moves, place

EXAMPLES = settings(deadline=None, max_examples=60)
# From the README of DeepSeek's EPLB.
README = (
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
)
DEPLOYED = [  # experts, then replicas, groups, nodes, devices
    (256, 288, 8, 4, 32),
    (256, 320, 1, 1, 64),
    (256, 256, 1, 1, 16),
    (64, 80, 8, 2, 16),
]
LOADS = {
    "uniform": lambda rng, n: rng.random(n),
    "zipf": lambda rng, n: rng.permutation(1 / np.arange(1, n + 1) ** 0.6),
    "counts": lambda rng, n: rng.multinomial(9999, rng.dirichlet(np.ones(n))),
    "ties": lambda rng, n: rng.integers(1, 4, n),
    "one_hot": lambda rng, n: 7 * np.eye(n, dtype=int)[rng.integers(n)],
    "half": lambda rng, n: rng.random(n) * (rng.random(n) < 0.5),
}


@st.composite
def cases(draw, layers=2):
    """Loads of some layers, and sizes that go with them."""
    nodes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, nodes, 2 * nodes]))
    num_experts = groups * draw(st.integers(1, 4))
    devices = nodes * draw(st.integers(1, 4))
    slots = -(-num_experts // devices) + draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    kinds = [draw(st.sampled_from(sorted(LOADS))) for _ in range(layers)]
    load_LE = np.stack([LOADS[kind](rng, num_experts) for kind in kinds])
    return load_LE.astype(float), (devices * slots, groups, nodes, devices)


def busiest(load_LE, placed, sizes):
    """Returns the load of each layer's busiest device."""
    return device_load(load_LE, placed, sizes[-1]).max(-1)


def rule(load_LE, sizes):
    """Returns the slots [L, R] by DeepSeek's rule, and their busiest devices' loads."""
    slot_LR = [eplb.rule(load_E, *sizes) for load_E in load_LE]
    load_LD = [
        packing.device_load(load_E, slot_R, sizes[-1])
        for load_E, slot_R in zip(load_LE, slot_LR, strict=True)
    ]
    return np.array(slot_LR), np.max(load_LD, axis=-1)


def assert_equal(one: Placement, other: Placement):
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, y)


@EXAMPLES
@given(cases())
def test_every_expert_has_a_slot_and_the_maps_are_each_others_inverses(case):
    load_LE, sizes = case
    layers, experts = load_LE.shape
    got = place(load_LE, *sizes)
    assert [x.dtype for x in got] == [np.int32] * 3
    assert got.physical_to_logical.shape == (layers, sizes[0])
    assert got.logical_to_physical.shape == (layers, experts, sizes[0] - experts + 1)
    assert got.replica_count.min() >= 1
    for layer, expert in np.ndindex(layers, experts):
        slots = np.flatnonzero(got.physical_to_logical[layer] == expert)
        count = got.replica_count[layer, expert]
        padded = got.logical_to_physical[layer, expert]
        assert count == len(slots) and (padded[:count] == slots).all()
        assert (padded[count:] == -1).all()


@EXAMPLES
@given(cases())
@example((np.array([[6.0, 5, 1]]), (4, 1, 1, 2)))  # the rule repeats one, and is better
def test_no_device_is_busier_than_the_busiest_is_by_deepseeks_rule(case):
    load_LE, sizes = case
    got = place(load_LE, *sizes)
    slot_LR, bound_L = rule(load_LE, sizes)
    assert (busiest(load_LE, got, sizes) <= bound_L * (1 + 1e-9)).all()
    for ours_R, rules_R in zip(got.physical_to_logical, slot_LR, strict=True):
        if not packing.repeats(rules_R, sizes[-1]).any():
            assert not packing.repeats(ours_R, sizes[-1]).any()


def test_replicas_of_one_expert_are_on_two_devices_where_the_rule_is_no_better():
    load_LE, sizes = np.array([[11.0, 4, 18, 14, 16]]), (6, 1, 1, 2)
    slot_LR, bound_L = rule(load_LE, sizes)
    assert packing.repeats(slot_LR[0], 2).any()
    got = place(load_LE, *sizes)
    assert not packing.repeats(got.physical_to_logical[0], 2).any()
    assert busiest(load_LE, got, sizes) <= bound_L


def test_the_published_example_is_balanced_as_well_as_it_can_be():
    sizes, load_LE = (16, 4, 2, 8), np.array(README)
    got_L = busiest(load_LE, place(load_LE, *sizes), sizes) / load_LE.mean(-1) / 1.5
    rule_L = rule(load_LE, sizes)[1] / load_LE.mean(-1) / 1.5
    np.testing.assert_allclose(rule_L, [1.2081, 1.2422], rtol=1e-4)
    # The least of all groups on nodes, all counts and all pairs of replicas.
    np.testing.assert_allclose(got_L, [1.1694, 1.2422], rtol=1e-4)


@pytest.mark.parametrize("sizes", DEPLOYED, ids=str)
@pytest.mark.parametrize("kind", ["uniform", "zipf", "counts"])
def test_layers_of_deployed_sizes_are_better_balanced_than_by_the_rule(sizes, kind):
    experts, *sizes = sizes
    rng = np.random.default_rng(0)
    load_LE = np.stack([LOADS[kind](rng, experts) for _ in range(3)])
    got = place(load_LE, *sizes)
    slot_LR, bound_L = rule(load_LE, sizes)
    got_L = busiest(load_LE, got, sizes)
    assert (got_L <= bound_L).all()
    assert got_L.sum() < bound_L.sum()
    assert not packing.repeats(got.physical_to_logical.ravel(), 3 * sizes[-1]).any()


@EXAMPLES
@given(cases())
def test_all_experts_of_a_group_live_on_one_node(case):
    load_LE, sizes = case
    _, groups, nodes, _ = sizes
    group_LR = place(load_LE, *sizes).physical_to_logical // (
        load_LE.shape[1] // groups
    )
    for group_R in group_LR if groups > 1 else []:
        node_groups = [set(row.tolist()) for row in np.split(group_R, nodes)]
        assert sum(map(len, node_groups)) == groups


@EXAMPLES
@given(cases(), st.integers(-9, 9))
def test_a_layers_placement_is_its_own_and_the_unit_of_load_does_not_matter(
    case, power
):
    load_LE, sizes = case
    got = place(load_LE, *sizes)
    assert_equal(got, place(load_LE, *sizes))
    alone = place(load_LE[1:] * 2.0**power, *sizes)
    assert_equal(alone, Placement(*(x[1:] for x in got)))


@EXAMPLES
@given(cases())
def test_without_load_replicas_are_spread_evenly(case):
    load_LE, sizes = case
    got = place(load_LE * 0, *sizes)
    assert_equal(got, place(np.ones(load_LE.shape), *sizes))
    assert (np.ptp(got.replica_count, axis=-1) <= 1).all()


def test_a_layer_without_load_stays_as_it_is():
    previous = place(README, 16, 4, 2, 8)
    kept = place(np.zeros((2, 12)), 16, 4, 2, 8, previous, tolerance=1.0)
    assert_equal(kept, previous)


def test_experts_without_load_share_what_the_others_do_not_need():
    got = place([[8.0, 0, 0, 0]], 9, 1, 1, 3)
    assert got.replica_count.tolist() == [[3, 2, 2, 2]]


def test_loads_at_the_ends_of_float64_are_placed():
    for load in (5e-324, 1.7e308):
        got = place([[load, load, 0.0, 0.0]], 4, 1, 1, 2)
        assert all({*row} & {0, 1} for row in got.physical_to_logical.reshape(2, 2))


@pytest.mark.parametrize(("experts", "devices"), [(6, 3), (8, 2), (8, 4)])
@pytest.mark.parametrize("kind", ["uniform", "counts", "ties"])
def test_homes_without_copies_are_a_permutation_near_the_best_there_is(
    experts, devices, kind
):
    rng = np.random.default_rng(1)
    load_LE = np.stack([LOADS[kind](rng, experts) for _ in range(8)]).astype(float)
    got = place(load_LE, experts, 1, 1, devices)
    assert (np.sort(got.physical_to_logical) == np.arange(experts)).all()
    orders = np.array(list(itertools.permutations(range(experts))))
    split_LPD = load_LE[:, orders].reshape(8, len(orders), devices, -1).sum(-1)
    best_L = split_LPD.max(-1).min(-1)
    assert (busiest(load_LE, got, [devices]) <= 1.03 * best_L).all()


def test_a_placement_that_is_good_enough_has_no_moves():
    load_LE = np.stack([LOADS["zipf"](np.random.default_rng(0), 64)] * 2)
    sizes = (80, 8, 2, 16)
    previous = place(load_LE, *sizes)
    load_LE[1] *= np.exp(0.02 * np.random.default_rng(1).normal(size=64))
    assert_equal(place(load_LE, *sizes, previous, tolerance=1.1), previous)
    strict = place(load_LE, *sizes, previous, tolerance=1.0)
    assert not moves(previous, strict)[0].any() and moves(previous, strict)[1].any()


@EXAMPLES
@given(cases(), cases(), st.sampled_from([1.0, 1.05, 1.3]))
def test_whatever_the_previous_placement_the_wanted_balance_is_reached(
    case, other, tolerance
):
    load_LE, sizes = case
    before_LE = np.resize(other[0].ravel(), load_LE.shape)
    previous = place(before_LE, *sizes)
    got = place(load_LE, *sizes, previous, tolerance=tolerance)
    reachable_L = busiest(load_LE, place(load_LE, *sizes), sizes)
    within_L = busiest(load_LE, previous, sizes) <= tolerance * reachable_L
    got_L = busiest(load_LE, got, sizes)
    assert (got_L <= tolerance * reachable_L * (1 + 1e-8)).all()
    assert not moves(previous, got)[within_L].any()
    assert_equal(got, place(load_LE, *sizes, got, tolerance=tolerance))


@pytest.mark.parametrize("sizes", DEPLOYED, ids=str)
@pytest.mark.parametrize("kind", ["uniform", "zipf", "counts"])
def test_after_a_small_drift_few_of_the_moves_from_scratch_are_made(sizes, kind):
    experts, *sizes = sizes
    rng = np.random.default_rng(0)
    load_LE = np.stack([LOADS[kind](rng, experts) for _ in range(3)])
    previous = place(load_LE, *sizes)
    load_LE = load_LE * np.exp(0.1 * rng.normal(size=load_LE.shape))
    got, scratch = place(load_LE, *sizes, previous), place(load_LE, *sizes)
    few, all_moves = moves(previous, got).sum(), moves(previous, scratch).sum()
    assert few <= 0.3 * all_moves
    allowed_L = 1.05 * busiest(load_LE, scratch, sizes)
    assert (busiest(load_LE, got, sizes) <= allowed_L * (1 + 1e-8)).all()


def test_moves_are_near_the_fewest_that_reach_the_wanted_balance():
    rng, sizes = np.random.default_rng(0), (6, 1, 1, 3)
    every = itertools.product(range(4), repeat=6)
    every = np.array([slots for slots in every if len(set(slots)) == 4])
    count_PE = (every[:, :, None] == np.arange(4)).sum(1)
    made = fewest = 0
    for _ in range(40):
        previous = place(rng.random((1, 4)), *sizes)
        load_E = rng.random(4)
        got = place(load_E[None], *sizes, previous)
        reachable = busiest(load_E[None], place(load_E[None], *sizes), sizes)
        share_PR = np.take_along_axis(load_E / count_PE, every, 1)
        is_enough_P = share_PR.reshape(-1, 3, 2).sum(-1).max(-1) <= 1.05 * reachable
        changed_P = (every != previous.physical_to_logical[0]).sum(-1)
        made += moves(previous, got).sum()
        fewest += changed_P[is_enough_P].min()
    assert 0 < fewest <= made <= 1.3 * fewest


def test_only_groups_that_have_to_move_to_other_nodes_do():
    load_LE = np.ones((1, 32))
    sizes = (48, 8, 4, 8)
    previous = place(load_LE, *sizes)
    group_NS = previous.physical_to_logical.reshape(4, -1) // 4
    load_LE[0].reshape(8, 4)[np.unique(group_NS[1])] = 2  # one node has both
    got = place(load_LE, *sizes, previous)
    moved_N = moves(previous, got).reshape(4, -1).any(-1)
    assert moved_N.sum() == 2 and moved_N[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((15, 4, 2, 8), "num_devices=8 must divide num_replicas=15"),
        ((8, 4, 2, 8), "num_replicas=8 must be at least the 12 experts of load_LE"),
        ((16, 5, 1, 8), "num_groups=5 must divide experts of load_LE=12"),
        ((16, 4, 3, 8), "num_nodes=3 must divide num_devices=8"),
        ((24, 4, 3, 12), "num_groups=4 must be a multiple of num_nodes=3"),
        ((16, 4, 2, 0), "num_devices=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        place(np.array(README), *sizes)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_loads_that_are_none_are_refused(wrong):
    load_LE = np.array(README, float)
    load_LE[1, 3] = wrong
    with pytest.raises(ValueError, match=f"load_LE has {wrong}; loads are at least 0"):
        place(load_LE, 16, 4, 2, 8)


def test_a_load_of_other_dimensions_and_a_tolerance_below_1_are_refused():
    with pytest.raises(ValueError, match=r"load_LE has the shape \(12,\)"):
        place(README[0], 16, 4, 2, 8)
    with pytest.raises(ValueError, match=r"load_LE has the shape \(0, 12\)"):
        place(np.zeros((0, 12)), 16, 4, 2, 8)
    with pytest.raises(ValueError, match=r"tolerance=0.9 must be at least 1"):
        place(README, 16, 4, 2, 8, tolerance=0.9)


def test_a_previous_placement_of_another_model_is_refused():
    load_LE, sizes = np.array(README), (16, 4, 2, 8)
    previous = place(load_LE, *sizes)
    with pytest.raises(
        ValueError, match=r"previous has .* shape \(2, 16\) .* \(1, 16\)"
    ):
        place(load_LE[:1], *sizes, previous)
    with pytest.raises(
        ValueError, match=r"replica_count of \(2, 12\), but .* \(2, 8\)"
    ):
        place(load_LE[:, :8], *sizes, previous)
    anywhere = place(load_LE, 16, 1, 1, 8)
    with pytest.raises(
        ValueError, match="a group of experts on several nodes in layer"
    ):
        place(load_LE, *sizes, anywhere)
    lost = previous._replace(physical_to_logical=previous.physical_to_logical * 0)
    with pytest.raises(
        ValueError, match="previous doesn't have each of the 12 experts"
    ):
        place(load_LE, *sizes, lost)


def test_a_sweep_over_loads_that_drift_stays_balanced_with_few_moves():
    rng, sizes = np.random.default_rng(2), (80, 8, 2, 16)
    load_LE = np.stack([LOADS["counts"](rng, 64) + 1.0 for _ in range(2)])
    placed = place(load_LE, *sizes)
    made = 0
    for _ in range(10):
        load_LE *= np.exp(0.05 * rng.normal(size=load_LE.shape))
        new = place(load_LE, *sizes, placed, tolerance=1.1)
        made += moves(placed, new).mean() / 10
        placed = new
        reachable_L = busiest(load_LE, place(load_LE, *sizes), sizes)
        assert (busiest(load_LE, placed, sizes) <= 1.1 * reachable_L * 1.0001).all()
    assert 0 < made < 0.1


def test_device_loads_add_up_to_the_layers():
    load_LE = np.array(README)
    got_LD = placement.device_load(load_LE, place(load_LE, 16, 4, 2, 8), 8)
    np.testing.assert_allclose(got_LD.sum(-1), load_LE.sum(-1))
