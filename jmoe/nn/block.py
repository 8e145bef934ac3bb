"""A pre-norm transformer block: attention, then a feed-forward layer.

It maps the residual stream to itself and returns what it measured, so that it can be
the body of a scan over layers. Each is told its number, counted from 0 through the
model's layers and then its MTP modules: what differs by layer, such as noise, follows
from it.

Shapes: B batch, T position, S this device's positions, D hidden.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import AttentionConfig, FeedForwardConfig, ModelConfig
from jmoe.nn.cached import Groups
from jmoe.nn.feed_forwards import FEED_FORWARDS
from jmoe.nn.linear import DotGeneral, RMSNorm
from jmoe.nn.measured import Measured, beside
from jmoe.nn.mixers import MIXERS, Rotation, rotation
from jmoe.nn.noise import Noise
from jmoe.nn.tokens import UNTOLD, Tokens
from jmoe.ops import dot


class Positions(NamedTuple):
    """What blocks know of a batch's positions besides their hidden states.

    rotation: see `jmoe.nn.mixers`. segment_BT: int32, the documents that attention is
    confined to; None: it isn't. tokens: what feed-forward layers are told. groups: of
    positions whose earlier ones are in a cache (`jmoe.nn.cached`); None: there is none.
    """

    rotation: Rotation
    segment_BT: jax.Array | None = None
    tokens: Tokens = UNTOLD
    groups: Groups | None = None


def positions(
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    segment_BT: jax.Array | None = None,
    is_real_BT: jax.Array | None = None,
    noise: Noise | None = None,
    choice_BLTK: jax.Array | None = None,
) -> Positions:
    """Returns what the model's blocks know of a batch; see `Positions` and `Tokens`."""
    told = Tokens(
        is_real_BT, noise, tokens_BT, choice_BLTK, first_moe=cfg.num_dense_layers
    )
    return Positions(rotation(cfg.attention, tokens_BT.shape[-1]), segment_BT, told)


def cached_bytes(cfg: ModelConfig) -> int:
    """Returns what a decoder keeps of a token for one block."""
    kept = MIXERS[cfg.attention.kind].cached(cfg.attention, cfg.dtype)
    return sum(x.size * x.dtype.itemsize for x in kept.values())


def empty_cache(cfg: ModelConfig, num_pages: int, page_size: int) -> Any:
    """Returns a block's collection `cache`, of a decoder that has read nothing."""
    kept = MIXERS[cfg.attention.kind].cached(cfg.attention, cfg.dtype)
    size = num_pages, page_size
    pages = {name: jnp.zeros((*size, *x.shape), x.dtype) for name, x in kept.items()}
    return {"attention": pages}


def prepared(cfg: ModelConfig, params: Any) -> Any:
    """Returns a block's collection `prepared` (`jmoe.nn.cached`), of its parameters."""
    made = MIXERS[cfg.attention.kind].prepared(cfg.attention, params["attention"])
    return {"attention": made}


class Block(nn.Module):
    """A block of any kind of attention and any of feed-forward, by their records.

    Returns what it measured too, and is told its number.
    """

    mixer: AttentionConfig
    feed_forward: FeedForwardConfig
    norm_eps: float
    init_std: float
    dot_general: DotGeneral = dot.dot_general
    apart: bool = False  # see `moe.RoutedExperts`

    @classmethod
    def of(
        cls,
        cfg: ModelConfig,
        feed_forward: FeedForwardConfig,
        dot_general: DotGeneral = dot.dot_general,
        apart: bool = False,
        name: str | None = None,
    ) -> "Block":
        """Returns a block of the model with this feed-forward."""
        return cls(
            cfg.attention,
            feed_forward,
            cfg.norm_eps,
            cfg.init_std,
            dot_general,
            apart,
            name=name,
        )

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, positions: Positions, number: jax.Array
    ) -> tuple[jax.Array, Measured]:
        normed_BSD = RMSNorm(self.norm_eps, name="attention_norm")(x_BSD)
        own = self.init_std, self.dot_general
        mixer = MIXERS[self.mixer.kind].module(self.mixer, *own, name="attention")
        turns, segment_BT, tokens, groups = positions
        mixed_BSD, of_mixer = mixer(normed_BSD, turns, segment_BT, groups)
        x_BSD += mixed_BSD
        normed_BSD = RMSNorm(self.norm_eps, name="mlp_norm")(x_BSD)
        kind = FEED_FORWARDS[self.feed_forward.kind]
        feed_forward = kind.module(self.feed_forward, *own, self.apart, name=kind.name)
        out_BSD, of_feed_forward = feed_forward(normed_BSD, tokens.of_layer(number))
        return x_BSD + out_BSD, beside(of_mixer, of_feed_forward)
