"""Pre-norm transformer blocks: one with a dense MLP, one with a mixture of experts.

Both map the residual stream to itself and return what they measured, so that either can
be the body of a scan over layers. Each is told its number, counted from 0 through the
model's layers and then its MTP modules: what differs by layer, such as noise, follows
from it.

Shapes: B batch, T position, S this device's positions, D hidden.
"""

from typing import NamedTuple

import jax
from flax import linen as nn

from jmoe.config import ModelConfig
from jmoe.nn.attention import LatentAttention
from jmoe.nn.linear import DotGeneral, RMSNorm
from jmoe.nn.measured import NOTHING, Measured
from jmoe.nn.moe import MoE, SwiGLU
from jmoe.nn.noise import Noise
from jmoe.ops import dot


class Positions(NamedTuple):
    """What blocks know of a batch's positions besides their hidden states.

    rotation: cosines and sines, see `jmoe.ops.rope`. segment_BT: int32, the documents
    that attention is confined to; None: it isn't. is_real_BT: bool, where there is a
    token to be routed to experts; None: everywhere. noise: where random numbers come
    from; None: there is to be no randomness.
    """

    rotation: tuple[jax.Array, jax.Array]
    segment_BT: jax.Array | None = None
    is_real_BT: jax.Array | None = None
    noise: Noise | None = None


class DenseBlock(nn.Module):
    """A block whose MLP every token shares; measures nothing."""

    cfg: ModelConfig
    dot_general: DotGeneral = dot.dot_general

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, positions: Positions, number: jax.Array
    ) -> tuple[jax.Array, Measured]:
        del number
        cfg = self.cfg
        x_BSD = _attend(cfg, self.dot_general, x_BSD, positions)
        normed_BSD = RMSNorm(cfg.norm_eps, name="mlp_norm")(x_BSD)
        mlp = SwiGLU(cfg.dense_mlp_dim, cfg.init_std, self.dot_general, name="mlp")
        return x_BSD + mlp(normed_BSD), NOTHING


class MoEBlock(nn.Module):
    """A block with routed and shared experts; returns what they measured too."""

    cfg: ModelConfig
    dot_general: DotGeneral = dot.dot_general
    apart: bool = False  # see `moe.RoutedExperts`

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, positions: Positions, number: jax.Array
    ) -> tuple[jax.Array, Measured]:
        cfg = self.cfg
        x_BSD = _attend(cfg, self.dot_general, x_BSD, positions)
        normed_BSD = RMSNorm(cfg.norm_eps, name="mlp_norm")(x_BSD)
        moe = MoE(cfg.moe, cfg.init_std, self.dot_general, self.apart, name="moe")
        noise = None if positions.noise is None else positions.noise.of_layer(number)
        out_BSD, measured = moe(normed_BSD, positions.is_real_BT, noise)
        return x_BSD + out_BSD, measured


def _attend(cfg, dot_general, x_BSD, positions):
    """Adds attention, which both blocks share; modules belong to the calling block."""
    normed_BSD = RMSNorm(cfg.norm_eps, name="attention_norm")(x_BSD)
    attention = LatentAttention(
        cfg.attention, cfg.init_std, dot_general, name="attention"
    )
    return x_BSD + attention(normed_BSD, positions.rotation, positions.segment_BT)
