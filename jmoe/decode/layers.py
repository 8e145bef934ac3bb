"""A model's layers over the tokens of a step, whose earlier ones are cached.

Shapes: T token of the step, S this device's tokens, R row to draw a token of, D hidden,
V vocabulary (this device's part), L MoE layer, E expert.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import ModelConfig
from jmoe.decode.weights import Layer, Weights
from jmoe.nn.block import Block, Positions
from jmoe.nn.cached import COLLECTION, Groups
from jmoe.nn.linear import RMSNorm
from jmoe.nn.mixers import MIXERS
from jmoe.nn.mtp import MTPModule
from jmoe.nn.tokens import Tokens
from jmoe.parallel import collectives, vocabulary
from jmoe.parallel.vocabulary import AXIS


class Counts(NamedTuple):
    """Choices of real tokens, int32: of each expert [L, E], and dropped ones [L]."""

    count_LE: jax.Array
    dropped_L: jax.Array


def known(
    cfg: ModelConfig, token_T: jax.Array, position_T: jax.Array, groups: Groups
) -> Positions:
    """Returns what blocks know of tokens, which are where positions aren't below 0."""
    rotation = MIXERS[cfg.attention.kind].rotation(
        cfg.attention, jnp.maximum(position_T, 0)[None]
    )
    tokens = Tokens(
        (position_T >= 0)[None], id_BT=token_T[None], first_moe=cfg.num_dense_layers
    )
    return Positions(rotation, None, tokens, groups)


def embedded(cfg: ModelConfig, weights: Weights, token_T: jax.Array) -> jax.Array:
    """Returns this device's tokens' rows of the embedding, [S, D]."""
    return vocabulary.embed(weights.embedding, token_T[None], cfg.dtype)[0]


def blocks(
    cfg: ModelConfig,
    layers: Sequence[Layer],
    caches: Sequence[Any],
    x_SD: jax.Array,
    known: Positions,
) -> tuple[jax.Array, tuple[Any, ...], Counts]:
    """Returns what the last of these blocks computes, [S, D], and their caches.

    And what this device's tokens chose.
    """
    kept, counts = [], []
    for layer, cache in zip(layers, caches, strict=True):
        x_SD, cache, count = block(cfg, layer, cache, x_SD, known)
        kept.append(cache)
        if count is not None:
            counts.append(count)
    return x_SD, tuple(kept), jax.tree.map(lambda *x: jnp.stack(x), *counts)


def block(
    cfg: ModelConfig, layer: Layer, cache: Any, x_SD: jax.Array, known: Positions
) -> tuple[jax.Array, Any, Counts | None]:
    """Returns what one block computes, its cache, and what was chosen in it.

    That is None of a block without experts.
    """
    feed_forward, number, collections = layer
    module = Block.of(cfg, feed_forward)
    operands = x_SD[None], known, number
    (x_1SD, measured), cache = _apply(module, collections, cache, *operands)
    load = measured.load
    if load is None:
        return x_1SD[0], cache, None
    dropped = load.dropped_sending + load.dropped_receiving
    return x_1SD[0], cache, Counts(load.load_E, dropped)


def final_norm(cfg: ModelConfig, weights: Weights, x_SD: jax.Array) -> jax.Array:
    """Returns what the head and the MTP module read."""
    found: Any = RMSNorm(cfg.norm_eps).apply(weights.final_norm, x_SD)
    return found


def mtp(
    cfg: ModelConfig,
    weights: Weights,
    cache: Any,
    previous_SD: jax.Array,
    embedded_SD: jax.Array,
    known: Positions,
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns the MTP module's hidden states, and normed ones, and its cache."""
    operands = previous_SD[None], embedded_SD[None], known, cfg.num_layers
    (hidden, normed, _), cache = _apply(MTPModule(cfg), weights.mtp, cache, *operands)
    return hidden[0], normed[0], cache


def logits(weights: Weights, hidden_RD: jax.Array) -> jax.Array:
    """Returns float32 logits of this device's part of the vocabulary, [R, V]."""
    head_DV = weights.embedding.T if weights.head is None else weights.head
    head_DV = head_DV.astype(hidden_RD.dtype)
    return jnp.dot(hidden_RD, head_DV, preferred_element_type=jnp.float32)


def whole(x_SD: jax.Array) -> jax.Array:
    """Returns all devices' tokens, [T, D]."""
    return collectives.all_gather(x_SD, AXIS, 0)


def _apply(
    module: nn.Module, collections: Any, cache: Any, *operands: Any
) -> tuple[Any, Any]:
    """Returns a module's outputs, of which the last is what it measured, and its cache.

    The last operand is the number of its layer.
    """
    *inputs, number = operands
    applied: Any = module.apply(
        {**collections, COLLECTION: cache},
        *inputs,
        jnp.int32(number),
        mutable=[COLLECTION],
    )
    outputs, changed = applied
    return outputs, changed[COLLECTION]
