"""Slots and layouts of buffers: properties, for any visits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import dropping
from jmoe.config import RouterConfig
from jmoe.parallel import ragged, slots

ROUTER = RouterConfig(num_experts=8, top_k=3)
PEERS, N, V = 4, 6, 3

choices = st.lists(st.permutations(range(9)), min_size=N, max_size=N)  # 8 is nobody
orders = st.sampled_from(sorted(dropping.DROP_ORDERS))


@functools.partial(jax.jit, static_argnums=(2, 3))
def assign(expert_NK, gate_NK, order, capacity):
    """Assigns slots as the padded exchange does: `capacity` for each peer."""
    visits = dropping.find_visits(expert_NK, gate_NK, ROUTER, PEERS)
    rank_NV = dropping.DROP_ORDERS[order](visits, PEERS)
    is_kept_NV = slots.keep(visits, rank_NV, jnp.full(PEERS, capacity))
    first_P = jnp.arange(PEERS) * capacity
    return visits, slots.assign(visits, rank_NV, is_kept_NV, first_P, PEERS * capacity)


def drawn(permutations, seed):
    gate_NK = np.random.default_rng(seed).random((N, ROUTER.top_k), np.float32)
    return np.array(permutations, np.int32)[:, : ROUTER.top_k], gate_NK


@settings(deadline=None)
@given(choices, st.integers(0, 99), orders, st.sampled_from([1, 3, N]))
def test_each_kept_visit_has_a_slot_of_its_peer_alone(chosen, seed, order, capacity):
    visits, got = jax.tree.map(
        np.asarray, assign(*drawn(chosen, seed), order, capacity)
    )
    has_slot_NV = got.slot_NV < PEERS * capacity
    filled = got.slot_NV[has_slot_NV]
    assert len(set(filled.tolist())) == len(filled)
    np.testing.assert_array_equal(filled // capacity, visits.peer_NV[has_slot_NV])
    np.testing.assert_array_equal(got.token_R[filled], np.nonzero(has_slot_NV)[0])
    assert (got.token_R < N).sum() == len(filled)
    for peer in range(PEERS):
        wanted = (visits.peer_NV == peer).sum()
        # From the first slot on, with no gap.
        own_C = got.token_R[peer * capacity : (peer + 1) * capacity]
        assert ((own_C < N) == (np.arange(capacity) < wanted)).all()


@settings(deadline=None)
@given(choices, st.integers(0, 99), orders, st.sampled_from([1, 3, N]))
def test_placing_and_collecting_are_each_others_transposes(
    chosen, seed, order, capacity
):
    _, held = assign(*drawn(chosen, seed), order, capacity)
    rng = np.random.default_rng(seed)
    x_NX = rng.integers(-9, 9, (N, 2)).astype(np.float32)
    y_RX = rng.integers(-9, 9, (PEERS * capacity, 2)).astype(np.float32)
    placed_RX = slots.place(jnp.asarray(x_NX), held.token_R)
    collected_NX = slots.collect(jnp.asarray(y_RX), held)
    assert (placed_RX * y_RX).sum() == (x_NX * collected_NX).sum()
    assert not placed_RX[held.token_R == N].any()


def test_rows_that_return_are_added_in_float32():
    held = slots.Slots(jnp.array([0, 0, 0]), jnp.array([[0, 1, 2]]))
    row_RX = jnp.array([[1], [2**-8], [2**-8]], jnp.bfloat16)
    got = slots.collect(row_RX, held)
    assert got.dtype == jnp.bfloat16 and got == 1 + 2**-7


@jax.jit
def layout(count_PP, capacity, device):
    return ragged.plan(ragged.shared(count_PP, capacity), device)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=3, max_size=3
    ),
    st.integers(1, 30),
)
def test_rows_of_all_devices_arrive_in_order_and_return_to_where_they_were(
    count, capacity
):
    """Both ways of a ragged all-to-all, in NumPy, on each device's own plan."""
    count_PP = np.array(count, np.int32)
    layouts = [
        jax.tree.map(np.asarray, layout(count_PP, capacity, p)) for p in range(3)
    ]
    sent = [np.arange(100 * p, 100 * p + 27) for p in range(3)]
    arrived = ragged_all_to_all(sent, [plan.there for plan in layouts], capacity)
    for p, rows in enumerate(arrived):
        allowed_P = dropping.share_capacity(jnp.asarray(count_PP[:, p]), capacity)
        want = [sent[q][layouts[q].there.from_P[p] :][: allowed_P[q]] for q in range(3)]
        want = np.concatenate(want)
        np.testing.assert_array_equal(
            rows, np.pad(want, (0, capacity - len(want)), constant_values=-1)
        )
    returned = ragged_all_to_all(arrived, [plan.back for plan in layouts], 27)
    for p, rows in enumerate(returned):
        held = layouts[p].there.send_P.sum()
        np.testing.assert_array_equal(rows[:held], sent[p][:held])
        assert (rows[held:] == -1).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=3, max_size=3
    ),
    st.integers(1, 30),
)
def test_windows_hold_every_row_once_and_no_more_than_a_device_can(count, rows):
    count_PP = np.array(count, np.int32)
    parts = -(-count_PP.sum(0).max() // rows)
    windows = [ragged.window(count_PP, rows, nth) for nth in range(parts)]
    size_WPP, skipped_WPP = np.array(windows, int).reshape(-1, 2, 3, 3).swapaxes(0, 1)
    assert (size_WPP.sum(1) <= rows).all()
    np.testing.assert_array_equal(size_WPP.sum(0), count_PP)
    np.testing.assert_array_equal(skipped_WPP, size_WPP.cumsum(0) - size_WPP)


def ragged_all_to_all(buffers, sizes, rows):
    """What `lax.ragged_all_to_all` is documented to do, checking what it asks for."""
    out = np.full((len(buffers), rows), -1)
    for sender, (rows_R, own) in enumerate(zip(buffers, sizes, strict=True)):
        for peer, (start, count, to) in enumerate(zip(*own[:3], strict=True)):
            assert count == sizes[peer].receive_P[sender]
            assert start + count <= len(rows_R) and to + count <= rows
            assert (out[peer, to : to + count] == -1).all()
            out[peer, to : to + count] = rows_R[start : start + count]
    return out
