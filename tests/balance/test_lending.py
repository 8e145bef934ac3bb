"""Plans of lending against what they promise, and choices against plans."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import lending

PLAN = jax.jit(lending.plan, static_argnums=(1, 2, 3))
ASSIGN = jax.jit(lending.assign)

property_of_plans = settings(deadline=None, max_examples=30)
each_way = pytest.mark.parametrize(
    ("shape", "slots", "threshold", "devices_per_node"),
    [
        ((2, 4), 2, 0.0, None),
        ((4, 8), 1, 0.0, 2),
        ((4, 16), 2, 0.1, None),
        ((8, 16), 2, 0.0, 4),
        ((8, 16), 3, 0.1, 4),
    ],
)


@st.composite
def loads(draw, devices, experts):
    """Draws counts of choices: of all experts, of some, of one, or of none."""
    most = draw(st.sampled_from([0, 1, 7, 1000, 10**6]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load_PE = rng.integers(0, most + 1, (devices, experts))
    skew_E = rng.pareto(draw(st.sampled_from([0.3, 1.0, 100.0])), experts)
    load_PE = (load_PE * (skew_E / skew_E.max())).astype(np.int32)
    start = draw(st.integers(0, experts - 1))
    count = draw(st.sampled_from([1, 2, experts // devices, experts]))
    number_E = np.arange(experts)
    is_chosen_E = (start <= number_E) & (number_E < start + count)
    return np.where(is_chosen_E | (count == experts), load_PE, 0)


def planned(load_PE, *args):
    return jax.tree.map(np.asarray, PLAN(load_PE, *args))


def homes(devices, experts):
    return np.arange(experts) // (experts // devices)


@each_way
@property_of_plans
@given(data=st.data())
def test_every_row_is_computed_once_at_home_or_by_a_borrower(
    shape, slots, threshold, devices_per_node, data
):
    devices, experts = shape
    load_PE = data.draw(loads(devices, experts))
    got = planned(load_PE, slots, threshold, devices_per_node)
    assert got.rows_EP.dtype == got.borrowed_PS.dtype == np.int32
    np.testing.assert_array_equal(got.rows_EP.sum(1), load_PE.sum(0))
    assert (got.rows_EP >= 0).all() and got.borrowed_PS.shape == (devices, slots)
    for device, borrowed in enumerate(got.borrowed_PS.tolist()):
        lent = [expert for expert in borrowed if expert < experts]
        assert borrowed == lent + [experts] * (slots - len(lent))
        own = set(np.flatnonzero(homes(devices, experts) == device))
        assert len(lent) == len(set(lent)) and not set(lent) & own
        assert set(np.flatnonzero(got.rows_EP[:, device])) - own == set(lent)
        assert (np.diff(got.rows_EP[lent, device]) <= 0).all()


@pytest.mark.parametrize(
    ("shape", "nodes"), [((2, 4), 1), ((4, 16), 2), ((8, 16), 1), ((8, 16), 2)]
)
@property_of_plans
@given(data=st.data())
def test_with_a_slot_for_each_own_expert_no_device_has_two_rows_more_than_another(
    shape, nodes, data
):
    devices, experts = shape
    load_PE = data.draw(loads(devices, experts))
    got = planned(load_PE, experts // devices, 0.0, devices // nodes)
    rows_P = got.rows_EP.sum(0)
    assert rows_P.max() - rows_P.min() <= 1


@each_way
@property_of_plans
@given(data=st.data())
def test_only_those_above_the_threshold_lend_and_nobody_gets_above_it(
    shape, slots, threshold, devices_per_node, data
):
    devices, experts = shape
    load_PE = data.draw(loads(devices, experts))
    before_P = load_PE.sum(0).reshape(devices, -1).sum(1)
    got = planned(load_PE, slots, threshold, devices_per_node)
    after_P = got.rows_EP.sum(0)
    mean, more = divmod(int(before_P.sum()), devices)
    above = mean + mean * round(threshold * 10) // 10
    most = max(mean + bool(more), above)
    assert (after_P >= before_P)[before_P <= above].all()
    # A lender without slots for all that it was to give keeps that, and may meanwhile
    # be filled up itself.
    home_E = homes(devices, experts)
    away_E = load_PE.sum(0) - got.rows_EP[np.arange(experts), home_E]
    lends_P = np.bincount(home_E, away_E, devices) > 0
    borrows_P = (got.borrowed_PS < experts).any(1)
    is_free_P = ~(lends_P & borrows_P)
    assert (after_P <= np.maximum(before_P, most))[is_free_P].all()
    if slots >= experts // devices:
        assert after_P.max() <= most
    if before_P.max() <= above or before_P.max() - before_P.min() <= 1:
        assert (got.borrowed_PS == experts).all()


@pytest.mark.parametrize(
    ("threshold", "rows"), [(0.0, [100] * 4), (0.1, [110, 105]), (0.2, [120, 105])]
)
def test_nobody_lends_to_be_less_above_the_threshold(threshold, rows):
    load_PE = np.zeros((4, 8), np.int32)
    load_PE[1, ::2] = 120, 105, 90, 85  # the mean is 100
    rows_P = planned(load_PE, 2, threshold, None).rows_EP.sum(0)
    assert rows_P.tolist()[: len(rows)] == rows and rows_P.sum() == 400


@each_way
@property_of_plans
@given(data=st.data())
def test_a_device_borrows_from_one_other(
    shape, slots, threshold, devices_per_node, data
):
    devices, experts = shape
    load_PE = data.draw(loads(devices, experts))
    got = planned(load_PE, slots, threshold, devices_per_node)
    lenders = [
        {expert // (experts // devices) for expert in borrowed if expert < experts}
        for borrowed in got.borrowed_PS.tolist()
    ]
    assert max(map(len, lenders)) <= 1
    assert sum(map(len, lenders)) <= devices - 1


@property_of_plans
@given(data=st.data())
def test_nodes_that_have_their_share_lend_within_themselves(data):
    devices, experts, per_node = 8, 16, 4
    load_PE = data.draw(loads(devices, experts))
    load_E = load_PE.sum(0)
    load_E[8:] = data.draw(st.permutations(load_E[:8].tolist()))
    lacking = -load_E[:8].sum() % per_node  # so that devices' shares are alike
    load_E[[0, 8]] += lacking
    got = planned(np.stack([load_E] + [0 * load_E] * 7), 2, 0.0, per_node)
    rows_P = got.rows_EP.sum(0)
    assert (rows_P == rows_P[0]).all()
    node_E, node_P = np.arange(experts) // 8, np.arange(devices) // per_node
    assert not got.rows_EP[node_E[:, None] != node_P].any()


@pytest.mark.parametrize("most", [0, 1, 5])
def test_what_is_even_is_left_as_it_is(most):
    """Rows that don't divide evenly aren't lent to have the odd ones elsewhere."""
    load_PE = np.zeros((4, 8), np.int32)
    load_PE[:, ::2] = most
    load_PE[0, 6] += most > 1  # the last device's
    got = planned(load_PE, 2, 0.0, None)
    assert (got.borrowed_PS == 8).all()
    np.testing.assert_array_equal(got.rows_EP.sum(0)[:3], 4 * most)


@pytest.mark.parametrize("threshold", [0.0, 1.9, 50.0])
def test_sums_may_be_as_large_as_an_int32(threshold):
    load_PE = np.zeros((8, 16), np.int32)
    load_PE[:, 5] = lending.MAX_ROWS // 64 * 8
    rows_EP = planned(load_PE, 2, threshold, None).rows_EP.astype(np.int64)
    assert (rows_EP >= 0).all() and rows_EP[5].sum() == load_PE.sum(dtype=int)
    mean = lending.MAX_ROWS // 64 * 8
    assert rows_EP[5, 2] == min(8 * mean, mean + mean * round(threshold * 10) // 10)


def test_more_rows_than_an_int32_counts_are_refused():
    lending.check_rows(2**16, 8, 2**11)
    with pytest.raises(ValueError, match="8 devices x 33554432 tokens x top_k=8"):
        lending.check_rows(2**25, 8, 8)


@pytest.mark.parametrize(
    ("shape", "args", "message"),
    [
        ((1, 4), (1,), "One device .* nobody to lend to"),
        ((4, 8), (7,), "slots=7 must be from 0 to 6"),
        ((4, 8), (-1,), "slots=-1 must be from 0 to 6"),
        ((4, 6), (1,), "6 experts don't divide over 4 devices"),
        ((4, 8), (1, -0.1), "threshold=-0.1 must be at least 0"),
        ((4, 8), (1, float("nan")), "threshold=nan must be at least 0"),
        ((4, 8), (1, float("inf")), "threshold=inf must be at least 0, and finite"),
        ((4, 8), (1, 0.0, 3), "devices_per_node=3 doesn't divide the 4 devices"),
    ],
)
def test_what_cannot_be_planned_is_refused(shape, args, message):
    with pytest.raises(ValueError, match=message):
        lending.plan(np.zeros(shape, np.int32), *args)


@pytest.mark.parametrize("shape", [(2, 16), (4, 64), (8, 64), (8, 256)])
@pytest.mark.parametrize("popularity", ["one device", "zipf", "skewed"])
def test_four_slots_are_enough_to_be_a_hundredth_above_the_mean(shape, popularity):
    """On the first two shapes, one device's experts just fit in all others' slots."""
    devices, experts = shape
    rng = np.random.default_rng(0)
    share_E = {
        "one device": np.arange(experts) < experts // devices,
        "zipf": 1 / np.arange(1, experts + 1),
        "skewed": rng.dirichlet(np.full(experts, 0.3)),
    }[popularity]
    load_PE = rng.multinomial(10_000, share_E / share_E.sum(), devices)
    rows_P = planned(load_PE.astype(np.int32), 4, 0.0, None).rows_EP.sum(0)
    assert rows_P.max() <= 1.01 * 10_000


def test_what_a_borrower_has_no_room_for_goes_to_others():
    """A borrower that lacks seven rows doesn't keep the rest of its expert at home."""
    lender = [1645, 1122, 812, 697, 534, 490, 432, 348, 329, 270, 251, 248, 224, 206]
    lender += [206, 195, 174, 159, 156, 156, 152, 148, 123, 121, 120, 115, 108, 107]
    load_PM = np.zeros((8, 32), np.int32)
    load_PM[0] = [*lender, 106, 98, 93, 82]
    load_PM[1:, 0] = 2041, 1211, 938, 655, 575, 487, 450
    load_PE = np.zeros((8, 256), np.int32)
    load_PE[3] = load_PM.reshape(-1)
    rows_P = planned(load_PE, 4, 0.0, None).rows_EP.sum(0)
    assert rows_P.tolist() == [2048] * 8


def test_without_slots_all_stays_at_home():
    load_PE = np.arange(32, dtype=np.int32).reshape(4, 8)
    got = planned(load_PE, 0, 0.0, None)
    is_home_EP = homes(4, 8)[:, None] == np.arange(4)
    np.testing.assert_array_equal(
        got.rows_EP, np.where(is_home_EP, load_PE.sum(0)[:, None], 0)
    )


@st.composite
def choices(draw, devices, experts, tokens=12, top_k=3):
    """Draws distinct experts of each token, some of them nobody: [P, N, K]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.1, 1.0, 10.0]))
    noise = rng.gumbel(size=(devices, tokens, experts)) * spread
    score = noise + rng.normal(size=experts)
    expert_PNK = np.argsort(score, axis=-1)[..., :top_k].astype(np.int32)
    nobody = draw(st.sampled_from([0.0, 0.2, 1.0]))
    return np.where(rng.random(expert_PNK.shape) < nobody, experts, expert_PNK)


@pytest.mark.parametrize("shape", [(2, 4), (4, 8)])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_choices_are_divided_as_planned_and_stay_where_they_can(shape, data):
    devices, experts = shape
    hosted = slots = experts // devices
    expert_PNK = data.draw(choices(devices, experts))
    load_PE = np.stack(
        [np.bincount(x.ravel(), minlength=experts + 1)[:experts] for x in expert_PNK]
    ).astype(np.int32)
    lent = PLAN(load_PE, slots, 0.0, None)
    rows_EP, borrowed_PS = map(np.asarray, (lent.rows_EP, lent.borrowed_PS))
    count_PEP = np.zeros((devices, experts, devices), np.int32)
    for source, expert_NK in enumerate(expert_PNK):
        computer_NK, group_NK = map(
            np.asarray, ASSIGN(lent, load_PE, expert_NK, source)
        )
        assert computer_NK.dtype == group_NK.dtype == np.int32
        assert computer_NK.shape == group_NK.shape == expert_NK.shape
        for token, choice in np.ndindex(expert_NK.shape):
            expert, computer, group = (
                int(x[token, choice]) for x in (expert_NK, computer_NK, group_NK)
            )
            if expert == experts:
                assert (computer, group) == (devices, hosted + slots)
                continue
            own = range(computer * hosted, (computer + 1) * hosted)
            assert [*own, *borrowed_PS[computer]][group] == expert
            count_PEP[source, expert, computer] += 1
    np.testing.assert_array_equal(count_PEP.sum(0), rows_EP)
    stays_PE = count_PEP[np.arange(devices), :, np.arange(devices)]
    np.testing.assert_array_equal(stays_PE, np.minimum(load_PE, rows_EP.T))


def test_choices_may_be_assigned_in_chunks():
    rng = np.random.default_rng(0)
    score_NE = np.arange(8) + rng.normal(size=(12, 8))
    expert_NK = np.argsort(score_NE)[:, :3].astype(np.int32)
    load_E = np.bincount(expert_NK.ravel(), minlength=8).astype(np.int32)
    load_PE = np.stack([load_E] * 4)
    lent = PLAN(load_PE, 2, 0.0, None)
    whole = ASSIGN(lent, load_PE, expert_NK, 3)
    before_E = np.bincount(expert_NK[:5].ravel(), minlength=8).astype(np.int32)
    first = ASSIGN(lent, load_PE, expert_NK[:5], 3)
    second = ASSIGN(lent, load_PE, expert_NK[5:], 3, before_E)
    for x_NK, *chunks in zip(whole, first, second, strict=True):
        np.testing.assert_array_equal(np.concatenate(chunks), x_NK)
    ignored, _ = ASSIGN(lent, load_PE, expert_NK[5:], 3)
    assert (ignored != second[0]).any()


def test_metrics_tell_what_was_uneven_what_was_lent_and_what_is_left_over():
    load_PE = np.zeros((4, 8), np.int32)
    load_PE[0, :2] = 8, 4
    load_PE[2, 2] = 4
    measure = functools.partial(lending.measure, load_PE)
    got = measure(PLAN(load_PE, 2, 0.0, None))
    assert got == (2.0, 0.0, 2, 0)
    assert [x.dtype for x in got] == ["float32", "float32", "int32", "int32"]
    assert measure(PLAN(load_PE, 0, 0.0, None)) == (2.0, 2.0, 0, 8)
    nothing = lending.measure(0 * load_PE, PLAN(0 * load_PE, 2, 0.0, None))
    assert nothing == (0.0, 0.0, 0, 0)
    # 16 rows of devices 0 (12) and 1 (4), and so 4 to each.
    lent_LP = lending.loans_between(PLAN(load_PE, 2, 0.0, None))
    assert lent_LP.tolist() == [[0, 0, 1, 1], [0] * 4, [0] * 4, [0] * 4]
