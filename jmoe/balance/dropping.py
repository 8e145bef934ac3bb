"""Capacities of peers, and which of the tokens that visit them are dropped.

Experts are divided over P peers. A token *visits* each peer that hosts one of its
chosen experts, once, however many of them are there. A peer's *capacity* is a fixed
number of visits; those beyond it are dropped, with all the choices that they stand for.
What is left of the token keeps its gates: they are not scaled up again.

It is enough for everything, or a capacity factor times a peer's balanced load:
the visits that it gets if all experts are alike (GShard, arXiv 2006.16668, section 2.2,
has it for each expert). If a token may choose from few groups of experts (DeepSeek-V3's
node-limited routing), it visits few peers, and they need little capacity.

Shapes: N token, K choice of a token, P peer, V most visits of a token.
"""

import collections
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.config import RouterConfig


class Visits(NamedTuple):
    """The peers of each token, and what it looks for there; each [N, V].

    peer_NV: int32, ascending; P where the token has fewer visits, which are left empty.
    gate_NV: float32 sum of the gates of the choices that lie there; takes no gradient.
    choices_NV: int32, how many those are.
    """

    peer_NV: jax.Array
    gate_NV: jax.Array
    choices_NV: jax.Array


def most_visits(router: RouterConfig, peers: int) -> int:
    """Returns V: how many of `peers` one token can need.

    They divide the experts evenly.
    """
    per_peer = router.num_experts // peers
    starts = range(0, router.num_experts, router.group_size)
    ends = (start + router.group_size - 1 for start in starts)
    span = max(
        end // per_peer - start // per_peer
        for start, end in zip(starts, ends, strict=True)
    )
    return min(router.top_k, peers, router.most_groups * (span + 1))


def expected_visits(router: RouterConfig, peers: int) -> Fraction:
    """Returns how many of `peers` a token visits on average if all experts are alike.

    Then each choice of groups is as likely as any, and each choice of experts within
    those groups. `peers` divide the experts evenly, and a token's own device is one.
    """
    hosted = router.num_experts // peers
    missed = sum(_missed(router, peer * hosted, hosted) for peer in range(peers))
    groups = math.comb(router.num_groups, router.most_groups)
    reachable = router.most_groups * router.group_size
    return peers - Fraction(missed, groups * math.comb(reachable, router.top_k))


def _missed(router: RouterConfig, first: int, hosted: int) -> int:
    """Returns how many choices of groups and experts have none of `hosted` experts."""
    # Of so many groups, which host so many of these experts: how many choices.
    ways = collections.Counter({(0, 0): 1})
    for start in range(0, router.num_experts, router.group_size):
        end = min(start + router.group_size, first + hosted)
        here = max(0, end - max(start, first))
        for (chosen, experts), count in list(ways.items()):
            ways[chosen + 1, experts + here] += count
    reachable = router.most_groups * router.group_size
    return sum(
        count * math.comb(reachable - experts, router.top_k)
        for (chosen, experts), count in ways.items()
        if chosen == router.most_groups
    )


def send_capacity(
    factor: float | None, num_tokens: int, router: RouterConfig, peers: int
) -> int:
    """Returns C: visits of its `num_tokens` that a device can pay to one peer.

    `factor`, the capacity factor, is a multiple of the balanced load. All visits fit if
    it is None, or makes a capacity of as many.
    """
    return _capacity(factor, num_tokens, router, peers)


def receive_capacity(
    factor: float | None, num_tokens: int, router: RouterConfig, peers: int
) -> int:
    """Returns R: visits that a peer can receive from all devices.

    Each has `num_tokens`.
    """
    return _capacity(factor, peers * num_tokens, router, peers)


def _capacity(
    factor: float | None, num_tokens: int, router: RouterConfig, peers: int
) -> int:
    """Returns a peer's capacity, of the visits that so many tokens pay to it."""
    if factor is None or is_dropless(factor, router, peers):
        return num_tokens
    return math.ceil(num_tokens * _capacity_per_token(factor, router, peers))


def is_dropless(factor: float, router: RouterConfig, peers: int) -> bool:
    """Returns whether this capacity factor lets each peer hold all tokens."""
    return _capacity_per_token(factor, router, peers) >= 1


def _capacity_per_token(factor: float, router: RouterConfig, peers: int) -> Fraction:
    """Returns a peer's capacity as a share of all tokens.

    It is exact, as 1.1 x 50 is above 55 in floating point.
    """
    return Fraction(str(factor)) * expected_visits(router, peers) / peers


def find_visits(
    expert_NK: jax.Array, gate_NK: jax.Array, router: RouterConfig, peers: int
) -> Visits:
    """Returns the visits that tokens need for their choices.

    Args:
      expert_NK: int32 in [0, E]; E is nobody, whom no peer hosts.
    """
    top_k = expert_NK.shape[1]
    peer_NK = expert_NK // (router.num_experts // peers)
    same_NKK = peer_NK[:, :, None] == peer_NK[:, None, :]
    is_repeated_NK = (same_NKK & jnp.tri(top_k, k=-1, dtype=bool)).any(-1)
    visit_NK = jnp.sort(jnp.where(is_repeated_NK, peers, peer_NK), axis=1)
    peer_NV = jnp.minimum(visit_NK[:, : most_visits(router, peers)], peers)
    here_NVK = (peer_NV[:, :, None] == peer_NK[:, None, :]) & (peer_NK < peers)[:, None]
    gate_N1K = lax.stop_gradient(gate_NK)[:, None]
    return Visits(
        peer_NV.astype(jnp.int32),
        jnp.where(here_NVK, gate_N1K, 0).sum(-1),
        here_NVK.sum(-1, dtype=jnp.int32),
    )


def count_visits(visits: Visits, peers: int) -> jax.Array:
    """Returns how many visits each peer gets, int32 [P]."""
    return _is_visited(visits, peers).sum(0, dtype=jnp.int32)


def _is_visited(visits: Visits, peers: int) -> jax.Array:
    return (visits.peer_NV[:, :, None] == jnp.arange(peers)).any(1)


DropOrder = Callable[[Visits, int], jax.Array]
"""`order(visits, peers)`: int32 [N, V], each visit's rank among those to its peer.

Ranks count from 0. With a capacity of n, visits of rank n and more go. Empty visits
have any rank.
"""


def by_position(visits: Visits, peers: int) -> jax.Array:
    """Ranks visits by position, so that later tokens go first."""
    rank_NP = jnp.cumsum(_is_visited(visits, peers), axis=0, dtype=jnp.int32) - 1
    peer_NV = jnp.minimum(visits.peer_NV, peers - 1)
    return jnp.take_along_axis(rank_NP, peer_NV, axis=1)


def by_score(visits: Visits, peers: int) -> jax.Array:
    """Ranks visits so that those whose gates have the lowest sum go first.

    Of equals, later tokens go first.
    """
    count_P = count_visits(visits, peers)
    return _rank_by_gate(visits.peer_NV, visits.gate_NV, count_P)


def _rank_by_gate(
    peer_NV: jax.Array, gate_NV: jax.Array, count_P: jax.Array
) -> jax.Array:
    peer_X, gate_X = peer_NV.ravel(), gate_NV.ravel()
    index_X = jnp.arange(peer_X.size, dtype=jnp.int32)
    sorted_X, _, from_X = lax.sort((peer_X, -gate_X, index_X), num_keys=2)
    first_P = jnp.append(jnp.cumsum(count_P) - count_P, count_P.sum())
    rank_X = index_X - first_P[sorted_X]
    rank_X = jnp.zeros_like(rank_X).at[from_X].set(rank_X, unique_indices=True)
    return rank_X.reshape(peer_NV.shape)


def least_important_dropped(
    place_NK: jax.Array, gate_NK: jax.Array, allowed_P: jax.Array, places: int
) -> jax.Array:
    """Returns choices of which each peer has no more than it is allowed.

    The lowest gates go first, and of equals later tokens'. But a token's highest stays:
    so a peer may have some more.

    Args:
      place_NK: int32, of `places` that peers divide evenly; `places` is nobody.
      allowed_P: int32.
    """
    peers, top_k = len(allowed_P), place_NK.shape[1]
    peer_NK = place_NK // (places // peers)
    gate_NK = jnp.where(place_NK < places, gate_NK, -jnp.inf)
    is_best_NK = jnp.arange(top_k) == gate_NK.argmax(1)[:, None]
    gate_NK = jnp.where(is_best_NK, jnp.inf, gate_NK)
    rank_NK = _rank_by_gate(peer_NK, gate_NK, count_choices(place_NK, places, peers))
    stays_NK = is_best_NK | (rank_NK < jnp.append(allowed_P, 0)[peer_NK])
    return jnp.where(stays_NK, place_NK, places)


def count_choices(place_NK: jax.Array, places: int, peers: int) -> jax.Array:
    """Returns how many choices are each peer's, int32 [P]."""
    peer_NK = place_NK // (places // peers)
    return (peer_NK[..., None] == jnp.arange(peers)).sum((0, 1), dtype=jnp.int32)


DROP_ORDERS: dict[str, DropOrder] = {"score": by_score, "position": by_position}


def dropped_choices(visits: Visits, is_kept_NV: jax.Array) -> jax.Array:
    """Returns how many (token, expert) choices, int32, are lost with other visits."""
    return jnp.where(is_kept_NV, 0, visits.choices_NV).sum(dtype=jnp.int32)


def share_capacity(count_P: jax.Array, capacity: jax.Array | int) -> jax.Array:
    """Returns how many visits each sender may pay to one peer, int32 [P].

    All of them where they fit. Otherwise none may pay more than one above another who
    wanted as many: the capacity is divided evenly between those that want more than an
    even share, and of what is left over, the first senders get one each.

    Args:
      count_P: how many each wants to pay.
    """
    senders = count_P.shape[0]
    sorted_P = jnp.sort(count_P)
    before_P = jnp.cumsum(sorted_P) - sorted_P
    # Were the i least wanting served in full, this is what each of the others gets. No
    # i gives too much, and one of them gives all there is.
    level = ((capacity - before_P) // (senders - jnp.arange(senders))).max()
    allowed_P = jnp.minimum(count_P, level)
    wants_more_P = count_P > level
    left_over = capacity - allowed_P.sum()
    gets_one_P = wants_more_P & (jnp.cumsum(wants_more_P) <= left_over)
    return (allowed_P + gets_one_P).astype(jnp.int32)
