"""The kinds of attention that a block can mix positions with.

The record of a kind (`jmoe.config.attention`) says what it is like; the table here has
what the rest of the project must know of it, and asks no further. A new kind is a
record, a module and a row.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import AttentionConfig
from jmoe.nn import grouped_query_attention, latent_attention
from jmoe.ops import rope

Rotation = tuple[jax.Array, jax.Array]


class Mixer(NamedTuple):
    """What there is to know of a kind; each function takes its record first.

    module: of the record, the standard deviation of new weights and a `dot_general`;
      maps hidden states [B, S, D], a rotation, segments [B, T] or None, and groups
      (`jmoe.nn.cached`) or None, to [B, S, D] and what it measured.
    rotation: of positions [B, T], what the module is given: float32 cosines and sines.
    cost: of the hidden dimension and the sequence's length, a token's operations in a
      forward pass.
    cached: of the activations' dtype, what a decoder keeps of each token, by the
      names that the module has in the collection `cache`.
    prepared: of the module's parameters, what a decoder computes once, likewise in the
      collection `prepared`.
    """

    module: Callable[..., nn.Module]
    rotation: Callable[[Any, jax.Array], Rotation]
    cost: Callable[[Any, int, int], float]
    cached: Callable[[Any, jax.typing.DTypeLike], dict[str, jax.ShapeDtypeStruct]]
    prepared: Callable[[Any, Any], dict[str, jax.Array]]


def _rotary(cfg: AttentionConfig, position_BT: jax.Array) -> Rotation:
    return rope.rotation(position_BT, cfg.rope_dim, cfg.rope_theta, cfg.yarn)


MIXERS: Mapping[str, Mixer] = {
    "mla": Mixer(
        latent_attention.LatentAttention,
        _rotary,
        latent_attention.cost,
        latent_attention.cached,
        latent_attention.prepared,
    ),
    "gqa": Mixer(
        grouped_query_attention.GroupedQueryAttention,
        _rotary,
        grouped_query_attention.cost,
        grouped_query_attention.cached,
        grouped_query_attention.prepared,
    ),
}


def rotation(cfg: AttentionConfig, length: int) -> Rotation:
    """Returns what a block of this kind is given of positions 0 to `length`."""
    return MIXERS[cfg.kind].rotation(cfg, jnp.arange(length)[None])
