"""Weights of 4 bits, two to a byte, with a scale for each group of inputs.

    w = level * scale,   level = -8 ... 7

for weights alone: they are dequantized where they are used, and products are of any
other kind. A group is GROUP inputs of one output. Its scale may be negative, so that
the largest weight of a group lies on the side of -8, whatever its sign. Of a few scales
that put it between -7, where nothing is cut off, and -9, a group takes the one with the
least squared error. For weights of a trained model that is 8.1% of their size, where
max |w| / 7 with levels of both signs alike leaves 9.6%.

Scales are bfloat16, which costs no precision, as levels are found for the rounded
scale: at 32 inputs a group, a weight takes 4.5 bits. A group that holds NaN or infinity
becomes NaN.

Shapes: K input (summed), N output, G = ceil(K / group) groups, P = ceil(K / 2) pairs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

GROUP = 32
LOWEST, HIGHEST = -8, 7
SPANS = (7.0, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5, 8.75, 9.0)  # of steps to the largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Matrices [..., K, N]; indexing the leading dimensions of its arrays picks some.

    data: uint8 [..., P, N]; a byte has the levels of two neighbouring inputs, each plus
      8, the first in its lower half.
    scale: bfloat16 [..., G, N].
    """

    data: jax.Array
    scale: jax.Array
    num_inputs: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-2], self.num_inputs, self.data.shape[-1])


@functools.partial(jax.jit, static_argnames="group")
def quantize(w: jax.Array, group: int = GROUP) -> Packed:
    """Quantizes [..., K, N]; the last group may be shorter.

    Raises:
      ValueError: there is no matrix, or a group has no inputs.
    """
    if w.ndim < 2 or group < 1:
        raise ValueError(
            f"int4 weights of shape={w.shape} in groups of group={group}: there must "
            "be at least 2 dimensions and 1 input a group."
        )
    num_inputs = w.shape[-2]
    tiles = _tiles(w.astype(jnp.float32), group)
    scale = _best_scale(tiles)
    level = (
        _levels(tiles, scale).astype(jnp.int32).reshape(*w.shape[:-2], -1, w.shape[-1])
    )
    data = _pack(level[..., :num_inputs, :])
    return Packed(data, scale.squeeze(-2).astype(jnp.bfloat16), num_inputs, group)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(w: Packed, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns [..., K, N]: `level * scale`, multiplied in float32, then converted."""
    level = _unpack(w.data)[..., : w.num_inputs, :]
    tiles = _tiles(level.astype(jnp.float32), w.group)
    product = tiles * w.scale[..., None, :].astype(jnp.float32)
    product = product.reshape(*w.shape[:-2], -1, w.shape[-1])
    return product[..., : w.num_inputs, :].astype(dtype)


def _best_scale(tiles: jax.Array) -> jax.Array:
    """Returns each group's scale, [..., G, 1, N], float32 of bfloat16's precision."""
    highest, lowest = (f(tiles, -2, keepdims=True) for f in (jnp.max, jnp.min))
    largest = jnp.where(highest > -lowest, highest, lowest)

    def error(scale):
        return jnp.square(_levels(tiles, scale) * scale - tiles).sum(-2, keepdims=True)

    best = _scale(largest, SPANS[0])
    least = error(best)
    for span in SPANS[1:]:
        scale = _scale(largest, span)
        squares = error(scale)
        best = jnp.where(squares < least, scale, best)
        least = jnp.minimum(squares, least)
    return jnp.where(jnp.isfinite(best), best, jnp.nan)


def _scale(largest: jax.Array, span: float) -> jax.Array:
    # A conversion to bfloat16 and back, XLA may leave out.
    scale = lax.reduce_precision(largest * (-1 / span), 8, 7)
    # The smallest normal number keeps the scale of a group of zeros from being zero.
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.where(jnp.abs(scale) < tiny, tiny, scale)


def _levels(tiles: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the nearest levels, float32; anything where the scale isn't finite."""
    return jnp.clip(jnp.round(tiles / scale), LOWEST, HIGHEST)


def _pack(level: jax.Array) -> jax.Array:
    """Returns uint8 [..., P, N] of whole numbers [..., K, N]."""
    *lead, num_inputs, outputs = level.shape
    padding = [(0, 0)] * len(lead) + [(0, num_inputs % 2), (0, 0)]
    code = (jnp.pad(level, padding) - LOWEST).astype(jnp.uint8)
    pairs = code.reshape(*lead, -1, 2, outputs)
    return pairs[..., 0, :] | pairs[..., 1, :] << 4


def _unpack(data: jax.Array) -> jax.Array:
    """Returns whole numbers, int8 [..., 2 P, N]."""
    *lead, _, outputs = data.shape
    pairs = jnp.stack([data & 15, data >> 4], axis=-2)
    return pairs.reshape(*lead, -1, outputs).astype(jnp.int8) + LOWEST


def _tiles(x: jax.Array, group: int) -> jax.Array:
    """Returns [..., G, group, N], filled with zeros."""
    *lead, num_inputs, outputs = x.shape
    padding = [(0, 0)] * len(lead) + [(0, -num_inputs % group), (0, 0)]
    return jnp.pad(x, padding).reshape(*lead, -1, group, outputs)
