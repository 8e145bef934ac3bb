"""How routers choose experts: pure functions of one signature, in one table.

Shapes: B batch, S this device's positions, T all positions, E expert, G group,
J = E / G experts a group, K = top_k chosen experts, N = B * S, C tokens of a sequence
that an expert chooses.

    token_choice   a token takes the best by `score + bias`, within the best groups:
                   DeepSeek-V3 (arXiv 2412.19437, section 2.1.2)
    noisy          the same with normal noise on the scores, in training alone: the
                   noise of Shazeer et al. (arXiv 1701.06538, equation 4) of one scale
    expert_choice  an expert takes the best tokens of each sequence: Zhou et al. (arXiv
                   2202.09368, section 3.2)
    hash           by the token's id alone: Hash Layers (arXiv 2106.04426)
    balanced       by the position alone, all experts equally often: to measure a system
    replayed       as told: what a sampler has chosen, when its tokens are trained on

Whatever chooses, the weights of the chosen are gates of the raw scores, without bias
and noise. The bias lives in the `router_state` collection, outside of the gradient and
the optimizer; `jmoe.balance.bias` moves it once a step.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.balance import bias
from jmoe.config import RouterConfig
from jmoe.nn.tokens import Tokens
from jmoe.parallel import collectives

GATE_EPSILON = 1e-20  # DeepSeek's, in the division by the gates' sum


class Routing(NamedTuple):
    """What each token has chosen: int32 [N, K], with float32 gates [N, K].

    A token that isn't real chooses expert E, nobody.
    """

    expert_NK: jax.Array
    gate_NK: jax.Array


class Picks(NamedTuple):
    """What each expert has chosen of a sequence: int32 positions, float32 gates.

    is_real_BEC: bool, False for what an expert picked for want of real tokens. All
    devices of `tensor` have the picks of all positions.
    """

    position_BEC: jax.Array
    gate_BEC: jax.Array
    is_real_BEC: jax.Array


class Scored(NamedTuple):
    """What there is to choose by: float32 scores, the bias, and what tokens are.

    tokens: at all positions, those of other devices too.
    """

    score_BSE: jax.Array
    bias_E: jax.Array
    tokens: Tokens

    @property
    def score_NE(self) -> jax.Array:
        return self.score_BSE.reshape(-1, self.score_BSE.shape[-1])

    @property
    def is_real_N(self) -> jax.Array | None:
        is_real_BS = self.tokens.here(self.tokens.is_real_BT)
        return None if is_real_BS is None else is_real_BS.reshape(-1)


def top2_sum(score_NGJ: jax.Array) -> jax.Array:
    """Returns the sum of a group's best two scores, [N, G]; a lone one's score."""
    if score_NGJ.shape[-1] == 1:
        return score_NGJ[..., 0]

    def best_two(these, those):
        (best, second), (other, its_second) = these, those
        second = lax.max(lax.min(best, other), lax.max(second, its_second))
        return lax.max(best, other), second

    # `top_k` would sort each group, which takes more than ten times as long.
    least = jnp.array(-jnp.inf, score_NGJ.dtype)
    pair = score_NGJ, jnp.full_like(score_NGJ, least)
    best_NG, second_NG = lax.reduce(pair, (least, least), best_two, (2,))
    return best_NG + second_NG


GROUP_SCORE = {"top2_sum": top2_sum, "max": functools.partial(jnp.max, axis=-1)}


def limit_to_groups(
    biased_NE: jax.Array, cfg: RouterConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns biased scores, -inf outside of best groups, and group scores [N, G].

    A group's score is the sum of its two best biased scores (V3) or its best (V2).
    """
    biased_NGJ = biased_NE.reshape(-1, cfg.num_groups, cfg.group_size)
    group_NG = GROUP_SCORE[cfg.group_score](biased_NGJ)
    if cfg.groups_per_token == cfg.num_groups:
        return biased_NE, group_NG
    _, kept_NX = lax.top_k(group_NG, cfg.groups_per_token)
    kept_NG = (kept_NX[:, :, None] == jnp.arange(cfg.num_groups)).any(1)
    reachable_NGJ = jnp.where(kept_NG[:, :, None], biased_NGJ, -jnp.inf)
    return reachable_NGJ.reshape(biased_NE.shape), group_NG


def gates(score_NE: jax.Array, expert_NK: jax.Array, cfg: RouterConfig) -> jax.Array:
    """Returns combine weights [N, K] from the raw scores of the chosen experts."""
    gate_NK = jnp.take_along_axis(score_NE, expert_NK, axis=-1)
    if cfg.normalize_gates:
        gate_NK = gate_NK / (gate_NK.sum(-1, keepdims=True) + GATE_EPSILON)
    return gate_NK * cfg.gate_scale


def route(
    score_NE: jax.Array,
    bias_E: jax.Array,
    cfg: RouterConfig,
    is_real_N: jax.Array | None = None,
) -> tuple[Routing, jax.Array]:
    """Returns the experts with the best biased scores, weighed by the raw scores.

    And what the update rule needs besides counts: `margin_EM`.

    Args:
      bias_E: what is added to choose; [N, E] if it differs by token.
      is_real_N: bool, which tokens are to be routed; None: all.
    """
    biased_NE = lax.stop_gradient(score_NE + bias_E)
    reachable_NE, group_NG = limit_to_groups(biased_NE, cfg)
    _, expert_NK = lax.top_k(reachable_NE, cfg.top_k)
    margin_EM = _no_margins(cfg)
    if cfg.update_rule in bias.MARGIN_RULES:
        margin_EM = bias.margin_histogram(
            selection_margins(biased_NE, reachable_NE, group_NG, cfg), is_real_N
        )
    return weigh(score_NE, expert_NK, cfg, is_real_N), margin_EM


def weigh(
    score_NE: jax.Array,
    expert_NK: jax.Array,
    cfg: RouterConfig,
    is_real_N: jax.Array | None,
) -> Routing:
    """Returns choices with their gates; those of tokens that aren't real are nobody."""
    gate_NK = gates(score_NE, expert_NK, cfg)
    if is_real_N is not None:
        expert_NK = jnp.where(is_real_N[:, None], expert_NK, cfg.num_experts)
    return Routing(expert_NK, gate_NK)


def _no_margins(cfg: RouterConfig) -> jax.Array:
    return jnp.zeros((cfg.num_experts, 0), jnp.int32)


def selection_margins(
    biased_NE: jax.Array,
    reachable_NE: jax.Array,
    group_NG: jax.Array,
    cfg: RouterConfig,
) -> jax.Array:
    """Returns how far each expert is above where a token's choice of it flips."""
    expert_N = bias.selection_threshold(reachable_NE, cfg.top_k)
    group_N = bias.selection_threshold(group_NG, cfg.groups_per_token)
    margin_NG = jnp.repeat(group_NG - group_N[:, None], cfg.group_size, axis=-1)
    return jnp.minimum(biased_NE - expert_N[:, None], margin_NG)


def token_choice(scored: Scored, cfg: RouterConfig) -> tuple[Routing, jax.Array]:
    """Returns each token's best experts by biased score."""
    return route(scored.score_NE, scored.bias_E, cfg, scored.is_real_N)


def noisy(scored: Scored, cfg: RouterConfig) -> tuple[Routing, jax.Array]:
    """Returns `token_choice` with noise on what is compared; none outside training."""
    noise = scored.tokens.noise
    if noise is None:
        return token_choice(scored, cfg)
    shape = (cfg.num_experts,)
    noise_BSE = noise.draw(
        scored.score_BSE.shape[1], lambda key: jax.random.normal(key, shape)
    )
    noise_NE = cfg.noise_std * noise_BSE.reshape(-1, cfg.num_experts)
    bias_NE = scored.bias_E + noise_NE
    return route(scored.score_NE, bias_NE, cfg, scored.is_real_N)


def _settled(
    scored: Scored, expert_NK: jax.Array, cfg: RouterConfig
) -> tuple[Routing, jax.Array]:
    """Returns what a router answers whose choices no score or bias has a part in."""
    routing = weigh(scored.score_NE, expert_NK, cfg, scored.is_real_N)
    return routing, _no_margins(cfg)


def hashed(scored: Scored, cfg: RouterConfig) -> tuple[Routing, jax.Array]:
    """Returns distinct experts that follow from each token's id."""
    id_BT = scored.tokens.id_BT
    assert id_BT is not None, "a model tells its layers the tokens"

    def of_id(token: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), token)
        _, expert_K = lax.top_k(jax.random.bits(key, (cfg.num_experts,)), cfg.top_k)
        return expert_K

    expert_NK = jax.vmap(of_id)(scored.tokens.here(id_BT).reshape(-1))
    return _settled(scored, expert_NK, cfg)


def balanced(scored: Scored, cfg: RouterConfig) -> tuple[Routing, jax.Array]:
    """Returns experts that follow from each position alone, all equally often.

    A position takes the groups after its predecessor's, as many as it may with as many
    experts of each: a system is measured with what it sends, too. In a group it takes
    the experts after those that were taken last. Where groups are no limit, the experts
    are divided into as few equal parts as give each choice another one, in place of
    groups. Over whole rounds, loads are exactly alike.

    In a step of decoding, a position is a token's place in the step, and so what is
    generated depends on who shares it.
    """
    sequences, length = scored.score_BSE.shape[:2]
    position_S = collectives.axis_index("tensor") * length + jnp.arange(length)
    groups, visited = cfg.num_groups, cfg.even_groups
    if groups == cfg.groups_per_token:
        parts = range(cfg.top_k, cfg.num_experts + 1)
        groups = next(n for n in parts if cfg.num_experts % n == 0)
        visited = cfg.top_k
    choice_K, size = jnp.arange(cfg.top_k), cfg.num_experts // groups
    visit_SK = position_S[:, None] * visited + choice_K % visited
    number_SK = visit_SK // groups * (cfg.top_k // visited) + choice_K // visited
    expert_SK = visit_SK % groups * size + number_SK % size
    expert_NK = jnp.tile(expert_SK, (sequences, 1)).astype(jnp.int32)
    return _settled(scored, expert_NK, cfg)


def replayed(scored: Scored, cfg: RouterConfig) -> tuple[Routing, jax.Array]:
    """Returns the experts that each token is told to take.

    Raises:
      ValueError: none are told, or those of another model or batch.
    """
    choice_BTK, score_BSE = scored.tokens.choice_BTK, scored.score_BSE
    if choice_BTK is None:
        raise ValueError(
            "router.kind='replayed' needs the experts to take, choice_BLTK."
        )
    length = score_BSE.shape[1] * collectives.axis_size("tensor")
    wanted = (score_BSE.shape[0], length, cfg.top_k)
    if choice_BTK.shape != wanted:
        raise ValueError(
            f"The experts to replay have shape {choice_BTK.shape} for a layer; this "
            f"batch has sequences x positions x top_k = {wanted}."
        )
    expert_NK = scored.tokens.here(choice_BTK).reshape(-1, cfg.top_k)
    return _settled(scored, expert_NK, cfg)


def expert_choice(scored: Scored, cfg: RouterConfig) -> tuple[Picks, jax.Array]:
    """Returns each expert's best tokens of each sequence, K T / E of them, rounded up.

    All experts are loaded alike, and a token meets K of them on average. Positions are
    compared with later ones: that is for training encoders, and what generates text
    can't choose so.
    """
    score_BTE = collectives.all_gather(scored.score_BSE, "tensor", 1)
    length = score_BTE.shape[1]
    is_real_BT = scored.tokens.is_real_BT
    if is_real_BT is None:
        is_real_BT = jnp.ones(score_BTE.shape[:2], bool)
    least = jnp.where(is_real_BT[..., None], score_BTE, -jnp.inf)
    capacity = min(-(-length * cfg.top_k // cfg.num_experts), length)
    _, position_BEC = lax.top_k(lax.stop_gradient(least).mT, capacity)
    gate_BEC = jnp.take_along_axis(score_BTE.mT, position_BEC, axis=-1)
    is_real_BEC = jax.vmap(lambda is_real_T, at_EC: is_real_T[at_EC])(
        is_real_BT, position_BEC
    )
    picks = Picks(position_BEC, gate_BEC * cfg.gate_scale, is_real_BEC)
    return picks, _no_margins(cfg)


def count_picks(picks: Picks, length: int) -> jax.Array:
    """Returns how many real tokens of this device's positions each expert picked, [E].

    Args:
      length: how many positions of each sequence this device has.
    """
    is_here_BEC = picks.position_BEC // length == collectives.axis_index("tensor")
    return (picks.is_real_BEC & is_here_BEC).sum((0, 2), dtype=jnp.int32)


Choice = Callable[[Scored, RouterConfig], tuple[Routing | Picks, jax.Array]]
"""`choose(scored, cfg) -> routing, margin_EM`."""

ROUTERS: dict[str, Choice] = {
    "token_choice": token_choice,
    "noisy": noisy,
    "expert_choice": expert_choice,
    "hash": hashed,
    "balanced": balanced,
    "replayed": replayed,
}
