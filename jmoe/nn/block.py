"""Pre-norm transformer blocks: one with a dense MLP, one with a mixture of experts.

Both map the residual stream to itself and return what they measured, so that either can
be the body of a scan over layers.

Shapes: B batch, T position, S this device's positions, D hidden.
"""

import jax
from flax import linen as nn

from jmoe.config import ModelConfig
from jmoe.nn.attention import LatentAttention
from jmoe.nn.linear import DotGeneral, RMSNorm
from jmoe.nn.moe import MoE, SwiGLU
from jmoe.nn.router import Stats
from jmoe.ops import dot

Rotation = tuple[jax.Array, jax.Array]  # cos and sin, see ops/rope.py


class DenseBlock(nn.Module):
    """A block whose MLP every token shares; measures nothing."""

    cfg: ModelConfig
    dot_general: DotGeneral = dot.dot_general

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, rotation: Rotation, segment_BT: jax.Array | None
    ) -> tuple[jax.Array, None]:
        cfg = self.cfg
        x_BSD = _attend(cfg, self.dot_general, x_BSD, rotation, segment_BT)
        normed_BSD = RMSNorm(cfg.norm_eps, name="mlp_norm")(x_BSD)
        mlp = SwiGLU(cfg.dense_mlp_dim, cfg.init_std, self.dot_general, name="mlp")
        return x_BSD + mlp(normed_BSD), None


class MoEBlock(nn.Module):
    """A block with routed and shared experts; returns their `Stats` too."""

    cfg: ModelConfig
    dot_general: DotGeneral = dot.dot_general

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, rotation: Rotation, segment_BT: jax.Array | None
    ) -> tuple[jax.Array, Stats]:
        cfg = self.cfg
        x_BSD = _attend(cfg, self.dot_general, x_BSD, rotation, segment_BT)
        normed_BSD = RMSNorm(cfg.norm_eps, name="mlp_norm")(x_BSD)
        moe = MoE(cfg.moe, cfg.init_std, self.dot_general, name="moe")
        out_BSD, stats = moe(normed_BSD)
        return x_BSD + out_BSD, stats


def _attend(cfg, dot_general, x_BSD, rotation, segment_BT):
    """The half that both blocks share; its modules belong to the calling block."""
    normed_BSD = RMSNorm(cfg.norm_eps, name="attention_norm")(x_BSD)
    attention = LatentAttention(
        cfg.attention, cfg.init_std, dot_general, name="attention"
    )
    return x_BSD + attention(normed_BSD, rotation, segment_BT)
