"""How many devices a token's experts are on."""

import math

from jmoe.balance import dropping
from jmoe.config import RouterConfig


def devices_visited(router: RouterConfig, peers: int) -> float:
    """How many of `peers` devices, but for its own, a token visits on average.

    If all experts are alike: each of their groups is as likely to be chosen as any, and
    so is each expert within those chosen. A device hosts whole groups, or a part of
    one.
    """
    hosted = router.num_experts // peers
    groups_here = max(1, hosted // router.group_size)
    here = min(hosted, router.group_size)  # of each of these groups
    reachable = router.groups_per_token * router.group_size
    missed = 0.0
    for chosen in range(groups_here + 1):
        others = router.num_groups - groups_here, router.groups_per_token - chosen
        likely = math.comb(groups_here, chosen) * math.comb(*others)
        elsewhere = math.comb(reachable - chosen * here, router.top_k)
        missed += likely * elsewhere
    missed /= math.comb(router.num_groups, router.groups_per_token)
    return (peers - 1) * (1 - missed / math.comb(reachable, router.top_k))


def capacity_factor(router: RouterConfig, peers: int, margin: float) -> float:
    """That which leaves room for `margin` times the visits that are to be expected.

    `ExchangeConfig.capacity_factor` counts in the most visits that a token can need,
    which more than one of its experts on one device makes fewer.
    """
    expected = devices_visited(router, peers) * peers / (peers - 1)
    return round(margin * expected / dropping.most_visits(router, peers), 3)
