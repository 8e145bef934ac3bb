"""Which choices an exchange drops when capacity is limited, counted one by one."""

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.balance import dropping
from jmoe.config import ExchangeConfig
from tests.parallel import exchanging
from tests.parallel.exchanging import (
    MESHES,
    ROUTER,
    TOKENS,
    arrays,
    compare,
    drops,
    on_mesh,
    oracle,
    random_choices,
)

ragged_on_cpu = exchanging.ragged_on_cpu


def skewed_choices():
    """The first two devices get more than their share, most of all from the first."""
    expert_NK = random_choices()
    expert_NK[:60] = [0, 1, 2, 4]
    return expert_NK


def kept_choices(expert_NK, gate_NK, peers, order, room_of):
    """Choices that keep their place, bool [N, K], visit by visit.

    room_of: from the visits of one device to one peer, how many keep it.
    """
    kept_NK = np.zeros(expert_NK.shape, bool)
    peer_NK = expert_NK // (ROUTER.num_experts // peers)
    per_device = len(expert_NK) // peers
    for device in range(peers):
        for peer in range(peers):
            tokens = device * per_device + np.arange(per_device)
            tokens = tokens[(peer_NK[tokens] == peer).any(1)]
            if order == "score":
                sums = (gate_NK * (peer_NK == peer))[tokens].sum(1)
                tokens = tokens[np.argsort(-sums)]
            for token in tokens[: room_of(device, peer)]:
                kept_NK[token] |= peer_NK[token] == peer
    return kept_NK


@pytest.mark.parametrize("order", dropping.DROP_ORDERS)
def test_beyond_their_capacity_senders_drop_the_last_of_the_order_and_no_more(order):
    cfg = ExchangeConfig(capacity_factor=1.0, drop_order=order)
    expert_NK, (dy, x, gate_NK, *weights) = skewed_choices(), arrays()
    got = on_mesh(MESHES["expert=4"], cfg, ROUTER)(expert_NK, dy, x, gate_NK, *weights)
    capacity = dropping.send_capacity(1.0, TOKENS // 4, ROUTER, 4)
    assert capacity == 35  # of 48 tokens, of which 0.728 visit each device
    kept_NK = kept_choices(expert_NK, gate_NK, 4, order, lambda device, peer: capacity)
    want = oracle(np.where(kept_NK, expert_NK, 16), dy, x, gate_NK, *weights)
    compare(got, want)
    lost = (~kept_NK).reshape(4, -1).sum(1)
    np.testing.assert_array_equal(got[-2], lost)
    assert lost.sum() > 0 and not got[-1].any()


@pytest.mark.parametrize("order", dropping.DROP_ORDERS)
def test_ragged_receivers_drop_what_is_beyond_their_share_and_no_more(order):
    cfg = ExchangeConfig(backend="ragged", capacity_factor=1.0, drop_order=order)
    expert_NK, (dy, x, gate_NK, *weights) = skewed_choices(), arrays()
    got = on_mesh(MESHES["expert=4"], cfg, ROUTER)(expert_NK, dy, x, gate_NK, *weights)
    capacity = dropping.receive_capacity(1.0, TOKENS // 4, ROUTER, 4)
    assert capacity == 140
    is_visit_SNP = (expert_NK // 4).reshape(4, 48, 4, 1) == np.arange(4)
    count_SP = is_visit_SNP.any(2).sum(1).astype(np.int32)
    share_SP = [
        dropping.share_capacity(count_S, capacity) for count_S in jnp.array(count_SP.T)
    ]
    kept_NK = kept_choices(
        expert_NK, gate_NK, 4, order, lambda device, peer: share_SP[peer][device]
    )
    want = oracle(np.where(kept_NK, expert_NK, 16), dy, x, gate_NK, *weights)
    compare(got, want)
    np.testing.assert_array_equal(got[-1], (~kept_NK).reshape(4, -1).sum(1))
    assert got[-1].any() and not got[-2].any()


def test_a_capacity_that_suffices_drops_nothing_and_one_less_does():
    expert_NK = random_choices()
    is_visit_SNP = (expert_NK // 4).reshape(4, 48, 4, 1) == np.arange(4)
    fullest = is_visit_SNP.any(2).sum(1).max()
    for capacity, dropped in ((fullest, False), (fullest - 1, True)):
        balanced = 48 * dropping.expected_visits(ROUTER, 4) / 4
        cfg = ExchangeConfig(capacity_factor=float((capacity - 0.5) / balanced))
        assert dropping.send_capacity(cfg.capacity_factor, 48, ROUTER, 4) == capacity
        got = on_mesh(MESHES["expert=4"], cfg, ROUTER)(expert_NK, *arrays())
        assert (sum(drops(got)) > 0) == dropped


def test_the_capacity_of_a_chunk_is_that_of_its_tokens():
    cfg = ExchangeConfig(capacity_factor=1.0, chunks=2)
    expert_NK = np.tile([0, 1, 2, 3], (TOKENS, 1)).astype(np.int32)
    got = on_mesh(MESHES["expert=4"], cfg, ROUTER)(expert_NK, *arrays())
    capacity = dropping.send_capacity(1.0, TOKENS // 4 // 2, ROUTER, 4)
    np.testing.assert_array_equal(got[-2], [2 * 4 * (24 - capacity)] * 4)
