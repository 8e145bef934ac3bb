"""Which experts a token visits, and with what weight.

Shapes: B batch, T position, D hidden, E expert, G group, S = E / G experts a group,
K = top_k chosen experts, N = B * T.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): the choice is by `score + bias`, within
the best groups; the weight is by `score` alone. The bias lives in the
`router_state` collection, outside the gradient and the optimizer; `jmoe.balance.bias`
moves it once a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.balance import bias, losses
from jmoe.config import RouterConfig
from jmoe.nn.linear import named_param

SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}
GATE_EPSILON = 1e-20  # DeepSeek's, in the division by the gates' sum


class Stats(NamedTuple):
    """What one MoE layer measured; `Transformer` stacks them along a layer dimension.

    load_E: int32, choices of each expert. dropped: int32, choices not computed.
    margin_EM: int32 histogram for the quantile rule, with M = 0 for the other rules.
    auxiliary_loss: float32, unweighted.
    """

    load_E: jax.Array
    dropped: jax.Array
    margin_EM: jax.Array
    auxiliary_loss: jax.Array


class Routing(NamedTuple):
    """The router's decision for each token: int32 [N, K] and float32 [N, K]."""

    expert_NK: jax.Array
    gate_NK: jax.Array


def biased_choice(
    score_NE: jax.Array, bias_E: jax.Array, cfg: RouterConfig
) -> tuple[jax.Array, jax.Array]:
    """Experts [N, K] by biased score within the best groups, and those scores [N, E].

    A group's score is the sum of its two best biased scores (V3) or its best (V2).
    Experts outside the chosen groups score -inf.
    """
    biased_NE = score_NE + bias_E
    if cfg.groups_per_token < cfg.num_groups:
        biased_NGS = biased_NE.reshape(-1, cfg.num_groups, cfg.group_size)
        best = 2 if cfg.group_score == "top2_sum" else 1
        group_NG = jax.lax.top_k(biased_NGS, best)[0].sum(-1)
        _, kept_NX = jax.lax.top_k(group_NG, cfg.groups_per_token)
        kept_NG = (kept_NX[:, :, None] == jnp.arange(cfg.num_groups)).any(1)
        biased_NGS = jnp.where(kept_NG[:, :, None], biased_NGS, -jnp.inf)
        biased_NE = biased_NGS.reshape(biased_NE.shape)
    _, expert_NK = jax.lax.top_k(biased_NE, cfg.top_k)
    return expert_NK, biased_NE


def gates(score_NE: jax.Array, expert_NK: jax.Array, cfg: RouterConfig) -> jax.Array:
    """Combine weights [N, K] from the raw scores of the chosen experts."""
    gate_NK = jnp.take_along_axis(score_NE, expert_NK, axis=-1)
    if cfg.normalize_gates:
        gate_NK = gate_NK / (gate_NK.sum(-1, keepdims=True) + GATE_EPSILON)
    return gate_NK * cfg.gate_scale


def route(
    score_NE: jax.Array, bias_E: jax.Array, cfg: RouterConfig
) -> tuple[Routing, jax.Array]:
    """Chooses experts by biased score but weighs them by the raw score.

    Returns the routing and the margins' histogram of the configured update rule.
    """
    fixed_NE = jax.lax.stop_gradient(score_NE)
    expert_NK, biased_NE = biased_choice(fixed_NE, bias_E, cfg)
    margin_EM = jnp.zeros((cfg.num_experts, 0), jnp.int32)
    if cfg.update_rule == "quantile":
        margin_EM = selection_margins(fixed_NE, biased_NE, cfg.top_k)
    return Routing(expert_NK, gates(score_NE, expert_NK, cfg)), margin_EM


def selection_margins(
    score_NE: jax.Array, biased_NE: jax.Array, top_k: int
) -> jax.Array:
    """Histogram, by expert, of the raw score above each token's selection threshold."""
    best = jax.lax.top_k(biased_NE, min(top_k + 1, biased_NE.shape[-1]))[0]
    last, next_ = best[:, top_k - 1], best[:, -1]
    threshold_N = jnp.where(jnp.isfinite(next_), (last + next_) / 2, last)
    return bias.margin_histogram(score_NE, threshold_N, bias.NUM_BINS)


def count(expert_NK: jax.Array, num_experts: int) -> jax.Array:
    """Exact int32 number of choices of each expert, [E]."""
    chosen = expert_NK.reshape(-1, 1) == jnp.arange(num_experts)
    return chosen.sum(0, dtype=jnp.int32)


class Router(nn.Module):
    """Owns the gate kernel (`params`) and the bias (`router_state`)."""

    cfg: RouterConfig
    init_std: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[Routing, Stats]:
        cfg = self.cfg
        shape = (x_BTD.shape[-1], cfg.num_experts)
        w_DE = named_param(
            self, "kernel", shape, ("embed", "router_logit"), self.init_std
        )
        bias_E = self.variable(
            "router_state", "bias", jnp.zeros, cfg.num_experts, jnp.float32
        ).value
        # Float32 end to end: bfloat16 scores tie often enough to skew the top-k.
        score_BTE = SCORES[cfg.score](x_BTD.astype(jnp.float32) @ w_DE)
        score_NE = score_BTE.reshape(-1, cfg.num_experts)
        routing, margin_EM = route(score_NE, bias_E, cfg)
        auxiliary = jnp.float32(0.0)
        if cfg.auxiliary_loss != "none":
            expert_BTK = routing.expert_NK.reshape(*x_BTD.shape[:2], cfg.top_k)
            auxiliary = losses.AUXILIARY_LOSSES[cfg.auxiliary_loss](
                score_BTE, expert_BTK
            )
        load_E = count(routing.expert_NK, cfg.num_experts)
        return routing, Stats(load_E, jnp.int32(0), margin_EM, auxiliary)
