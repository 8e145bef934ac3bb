"""Feed-forward layers: the dense SwiGLU, the routed experts, and their sum.

Shapes: B batch, T position, D hidden, F MLP dimension, E expert, N = B * T, K = top_k;
a leading 2 holds SwiGLU's gate and up halves side by side.
"""

import jax
from flax import linen as nn

from jmoe.config import MoEConfig
from jmoe.nn.linear import DotGeneral, Linear, named_param
from jmoe.nn.router import Router, Stats
from jmoe.ops import grouped


class SwiGLU(nn.Module):
    """`(silu(x @ gate) * (x @ up)) @ down` (Shazeer, arXiv 2002.05202)."""

    mlp_dim: int
    init_std: float
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_up = Linear(
            (2, self.mlp_dim),
            ("embed", None, "mlp"),
            self.init_std,
            self.dot_general,
            name="gate_up",
        )(x_BTD)
        hidden = nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        return Linear(
            (x_BTD.shape[-1],),
            ("mlp", "embed"),
            self.init_std,
            self.dot_general,
            name="down",
        )(hidden)


class RoutedExperts(nn.Module):
    """All routed experts' weights, applied to each token's chosen ones."""

    cfg: MoEConfig
    init_std: float

    @nn.compact
    def __call__(
        self, x_ND: jax.Array, expert_NK: jax.Array, gate_NK: jax.Array
    ) -> jax.Array:
        experts, mlp = self.cfg.router.num_experts, self.cfg.expert_mlp_dim
        hidden = x_ND.shape[-1]
        gate_up_ED2F = named_param(
            self,
            "gate_up",
            (experts, hidden, 2, mlp),
            ("expert", "embed", None, "mlp"),
            self.init_std,
        )
        down_EFD = named_param(
            self,
            "down",
            (experts, mlp, hidden),
            ("expert", "mlp", "embed"),
            self.init_std,
        )
        routed_mlp = grouped.BACKENDS[self.cfg.backend]
        dtype = x_ND.dtype
        return routed_mlp(
            x_ND, expert_NK, gate_NK, gate_up_ED2F.astype(dtype), down_EFD.astype(dtype)
        )


class MoE(nn.Module):
    """Shared experts for every token plus `top_k` routed ones, [B, T, D] each way."""

    cfg: MoEConfig
    init_std: float
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Stats]:
        cfg = self.cfg
        routing, stats = Router(cfg.router, self.init_std, name="router")(x_BTD)
        experts = RoutedExperts(cfg, self.init_std, name="experts")
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        out_BTD = experts(x_ND, *routing).reshape(x_BTD.shape)
        if cfg.num_shared_experts:
            # n experts that every token visits are one expert n times as wide.
            mlp_dim = cfg.num_shared_experts * cfg.expert_mlp_dim
            shared = SwiGLU(mlp_dim, self.init_std, self.dot_general, name="shared")
            out_BTD += shared(x_BTD)
        return out_BTD, stats
