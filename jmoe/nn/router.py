"""The module that scores experts, chooses by the scores, and counts what was chosen.

Shapes: B batch, T position (this device's), D hidden, E expert, K = top_k chosen
experts, N = B * T.

How it chooses is in `jmoe.nn.choices`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jmoe.balance import losses
from jmoe.config import RouterConfig
from jmoe.nn.choices import ROUTERS, Picks, Routing, Scored, count_picks
from jmoe.nn.measured import PER_MICROBATCH, PER_STEP, PER_TOKEN, Load, Loss, Measured
from jmoe.nn.parameter import MATRIX, Parameter, boxed, normal_param
from jmoe.nn.tokens import UNTOLD, Tokens
from jmoe.ops import dot, rows
from jmoe.parallel import collectives
from jmoe.parallel.mesh import BATCH_AXES, TOKEN_AXES


def sqrt_softplus(logit: jax.Array) -> jax.Array:
    """Returns DeepSeek-V4's scores, which have no upper bound."""
    return jnp.sqrt(jax.nn.softplus(logit))


SCORES = {
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
    "sqrt_softplus": sqrt_softplus,
}


def _spread(load_E: jax.Array | None) -> losses.Spread:
    """Says where a batch's tokens lie; a sequence's are on the devices of `tensor`.

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
    ) -> tuple[Routing | Picks, Measured]:
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
        scored = Scored(score_BTE, bias_E, tokens)
        # A new model's parameters don't depend on what it is told.
        kind = "token_choice" if self.is_initializing() else cfg.kind
        routing, margin_EM = ROUTERS[kind](scored, cfg)
        if isinstance(routing, Picks):
            load_E, expert_BTK = count_picks(routing, x_BTD.shape[1]), None
        else:
            if cfg.hash_layers:
                is_hashed = tokens.moe_layer < cfg.hash_layers
                by_id, _ = ROUTERS["hash"](scored, cfg)
                routing = jax.tree.map(
                    functools.partial(jnp.where, is_hashed), by_id, routing
                )
            load_E = rows.count(routing.expert_NK, cfg.num_experts)
            expert_BTK = routing.expert_NK.reshape(*x_BTD.shape[:2], cfg.top_k)
        none = jnp.int32(0)
        load = Load(load_E, none, none, margin_EM)
        is_real_BT = tokens.here(tokens.is_real_BT)
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
