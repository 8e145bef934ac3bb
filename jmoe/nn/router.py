"""Which experts a token visits, and with what weight.

Shapes: B batch, T position (this device's), D hidden, E expert, G group, J = E / G
experts a group, K = top_k chosen experts, N = B * T.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): the choice is by `score + bias`, within
the best groups; the weight is by `score` alone. The bias lives in the
`router_state` collection, outside the gradient and the optimizer; `jmoe.balance.bias`
moves it once a step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jmoe.balance import bias, losses
from jmoe.config import RouterConfig
from jmoe.nn.measured import PER_MICROBATCH, PER_STEP, PER_TOKEN, Load, Loss, Measured
from jmoe.nn.parameter import MATRIX, Parameter, boxed, normal_param
from jmoe.nn.tokens import UNTOLD, Tokens
from jmoe.ops import dot
from jmoe.parallel import collectives
from jmoe.parallel.mesh import BATCH_AXES, TOKEN_AXES

SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}
GATE_EPSILON = 1e-20  # DeepSeek's, in the division by the gates' sum


class Routing(NamedTuple):
    """The router's decision for each token: int32 [N, K] and float32 [N, K].

    A token that isn't real chooses expert E, nobody.
    """

    expert_NK: jax.Array
    gate_NK: jax.Array


def top2_sum(score_NGJ: jax.Array) -> jax.Array:
    """The sum of a group's best two scores, [N, G]; of a group of one, its score."""
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
    """Biased scores, -inf outside of each token's best groups, and group scores [N, G].

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
    """Combine weights [N, K] from the raw scores of the chosen experts."""
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
    """Chooses experts by biased score but weighs them by the raw score.

    Returns the routing and what the update rule needs besides counts: `margin_EM`.

    Args:
      is_real_N: bool, which tokens are to be routed; None: all.
    """
    biased_NE = lax.stop_gradient(score_NE + bias_E)
    reachable_NE, group_NG = limit_to_groups(biased_NE, cfg)
    _, expert_NK = lax.top_k(reachable_NE, cfg.top_k)
    margin_EM = jnp.zeros((cfg.num_experts, 0), jnp.int32)
    if cfg.update_rule in bias.MARGIN_RULES:
        margin_EM = bias.margin_histogram(
            selection_margins(biased_NE, reachable_NE, group_NG, cfg), is_real_N
        )
    gate_NK = gates(score_NE, expert_NK, cfg)
    if is_real_N is not None:
        expert_NK = jnp.where(is_real_N[:, None], expert_NK, cfg.num_experts)
    return Routing(expert_NK, gate_NK), margin_EM


def selection_margins(
    biased_NE: jax.Array,
    reachable_NE: jax.Array,
    group_NG: jax.Array,
    cfg: RouterConfig,
) -> jax.Array:
    """How far each expert is above the point where the token's choice of it flips."""
    expert_N = bias.selection_threshold(reachable_NE, cfg.top_k)
    group_N = bias.selection_threshold(group_NG, cfg.groups_per_token)
    margin_NG = jnp.repeat(group_NG - group_N[:, None], cfg.group_size, axis=-1)
    return jnp.minimum(biased_NE - expert_N[:, None], margin_NG)


def count(expert_NK: jax.Array, num_experts: int) -> jax.Array:
    """Returns the exact int32 number of choices of each expert, [E], without nobody."""
    chosen = expert_NK.reshape(-1, 1) == jnp.arange(num_experts)
    return chosen.sum(0, dtype=jnp.int32)


def _spread(load_E: jax.Array | None) -> losses.Spread:
    """Where a batch's tokens lie; a sequence's are on the devices of `tensor`.

    Args:
      load_E: the whole step's, where it is known; None: a step is this microbatch.
    """

    def over_batch(count: jax.Array) -> jax.Array:
        return collectives.psum(count, TOKEN_AXES)

    return losses.Spread(
        over_batch=over_batch,
        over_sequence=lambda count: collectives.psum(count, "tensor"),
        over_step=over_batch if load_E is None else lambda _: load_E,
        batch_parts=collectives.axis_size(BATCH_AXES),
    )


class Router(nn.Module):
    """Owns the gate kernel (`params`) and the bias (`router_state`).

    In `router_state` may also be `load`, int32 [E], the counts of all microbatches of a
    step, for the auxiliary loss of whole steps (see `nn.model.with_loads`).
    """

    cfg: RouterConfig
    init_std: float

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: Tokens = UNTOLD,
    ) -> tuple[Routing, Measured]:
        cfg = self.cfg
        shape = (x_BTD.shape[-1], cfg.num_experts)
        record = Parameter(
            dims=("embed", "router_logit"), matrix=MATRIX, in_float32=True
        )
        w_DE = normal_param(self, "kernel", shape, self.init_std, record)
        record = Parameter(dims=("router_logit",), in_float32=True, decays=False)
        bias_E = self.variable(
            "router_state",
            "bias",
            boxed(jnp.zeros, record),
            cfg.num_experts,
            jnp.float32,
        ).value
        # Float32 end to end: bfloat16 scores tie often enough to skew the top-k. A GPU
        # rounds float32 products to TF32, hardly finer, unless asked not to.
        x_BTD = x_BTD.astype(jnp.float32)
        logit_BTE: jax.Array = dot.linear(x_BTD, w_DE, lax.Precision.HIGHEST)
        score_BTE = SCORES[cfg.score](logit_BTE)
        score_NE = score_BTE.reshape(-1, cfg.num_experts)
        is_real_BT = tokens.is_real_BS
        is_real_N = None if is_real_BT is None else is_real_BT.reshape(-1)
        routing, margin_EM = route(score_NE, bias_E, cfg, is_real_N)
        load_E, none = count(routing.expert_NK, cfg.num_experts), jnp.int32(0)
        load = Load(load_E, none, none, margin_EM)
        expert_BTK = routing.expert_NK.reshape(*x_BTD.shape[:2], cfg.top_k)
        lost = self._losses(logit_BTE, score_BTE, expert_BTK, is_real_BT)
        return routing, Measured(load, lost, {})

    def _losses(self, logit_BTE, score_BTE, expert_BTK, is_real_BT) -> dict[str, Loss]:
        """Returns those that the configuration asks for."""
        cfg, found = self.cfg, {}
        if cfg.auxiliary_loss != "none":
            spread = _spread(self.get_variable("router_state", "load"))
            loss = losses.AUXILIARY_LOSSES[cfg.auxiliary_loss]
            of_step = cfg.auxiliary_loss in losses.OF_WHOLE_STEPS
            found["aux_loss"] = Loss(
                loss(score_BTE, expert_BTK, spread),
                cfg.auxiliary_weight,
                PER_STEP if of_step else PER_MICROBATCH,
            )
        if cfg.z_loss_weight:
            z_loss = losses.router_z(logit_BTE, is_real_BT)
            found["router_z_loss"] = Loss(z_loss, cfg.z_loss_weight, PER_TOKEN)
        return found
