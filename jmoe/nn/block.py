"""Pre-norm transformer blocks: one with a dense MLP, one with a mixture of experts.

Both map the residual stream [B, T, D] to itself and return what they measured, so that
either can be the body of a scan over layers.
"""

import jax
from flax import linen as nn

from jmoe.config import ModelConfig
from jmoe.nn.attention import LatentAttention
from jmoe.nn.linear import DotGeneral, RMSNorm
from jmoe.nn.moe import MoE, SwiGLU
from jmoe.nn.router import Stats

Rotation = tuple[jax.Array, jax.Array]  # cos and sin, see ops/rope.py


class DenseBlock(nn.Module):
    """A block whose MLP every token shares; measures nothing."""

    cfg: ModelConfig
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rotation: Rotation, segment_BT: jax.Array | None
    ) -> tuple[jax.Array, None]:
        cfg = self.cfg
        x_BTD = _attend(cfg, self.dot_general, x_BTD, rotation, segment_BT)
        normed_BTD = RMSNorm(cfg.norm_eps, name="mlp_norm")(x_BTD)
        mlp = SwiGLU(cfg.dense_mlp_dim, cfg.init_std, self.dot_general, name="mlp")
        return x_BTD + mlp(normed_BTD), None


class MoEBlock(nn.Module):
    """A block with routed and shared experts; returns their `Stats` too."""

    cfg: ModelConfig
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rotation: Rotation, segment_BT: jax.Array | None
    ) -> tuple[jax.Array, Stats]:
        cfg = self.cfg
        x_BTD = _attend(cfg, self.dot_general, x_BTD, rotation, segment_BT)
        normed_BTD = RMSNorm(cfg.norm_eps, name="mlp_norm")(x_BTD)
        moe = MoE(cfg.moe, cfg.init_std, self.dot_general, name="moe")
        out_BTD, stats = moe(normed_BTD)
        return x_BTD + out_BTD, stats


def _attend(cfg, dot_general, x_BTD, rotation, segment_BT):
    """The half that both blocks share; its modules belong to the calling block."""
    normed_BTD = RMSNorm(cfg.norm_eps, name="attention_norm")(x_BTD)
    attention = LatentAttention(
        cfg.attention, cfg.init_std, dot_general, name="attention"
    )
    return x_BTD + attention(normed_BTD, rotation, segment_BT)
