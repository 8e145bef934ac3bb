"""Expected visits, against tokens that choose by chance."""

import numpy as np
import pytest

from jmoe.balance import dropping
from jmoe.config import RouterConfig
from jmoe.plan import visits


@pytest.mark.parametrize(
    ("router", "peers"),
    [
        (RouterConfig(num_experts=16, top_k=3), 4),
        (RouterConfig(num_experts=16, top_k=4, num_groups=4, groups_per_token=2), 2),
        (RouterConfig(num_experts=16, top_k=4, num_groups=4, groups_per_token=2), 4),
        (RouterConfig(num_experts=16, top_k=4, num_groups=4, groups_per_token=2), 8),
    ],
)
def test_visits_are_those_of_tokens_that_like_all_experts_alike(router, peers):
    rng = np.random.default_rng(0)
    group_E = np.arange(router.num_experts) // router.group_size
    visited = np.zeros(peers)
    tokens = 4_000
    for _ in range(tokens):
        groups = rng.choice(router.num_groups, router.groups_per_token, replace=False)
        reachable = np.flatnonzero(np.isin(group_E, groups))
        chosen = rng.choice(reachable, router.top_k, replace=False)
        visited[np.unique(chosen // (router.num_experts // peers))] += 1
    others = visited[1:].sum() / tokens
    assert visits.devices_visited(router, peers) == pytest.approx(others, rel=0.03)


@pytest.mark.parametrize("peers", [4, 8])
def test_the_room_is_a_margin_over_the_visits_to_be_expected(peers):
    router = RouterConfig(num_experts=16, top_k=4)
    factor = visits.capacity_factor(router, peers, 1.25)
    room = dropping.send_room(factor, 10_000, router, peers)
    expected = 10_000 * visits.devices_visited(router, peers) / (peers - 1)
    assert room == pytest.approx(1.25 * expected, rel=0.002)
