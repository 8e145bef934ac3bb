"""Block-scaled FP8: e4m3 numbers with a float32 scale for each block of 128.

    x = data * scale,   scale = max |x of the block| / 448

as DeepSeek-V3 scales activations (arXiv 2412.19437, section 3.3.2): along a row, so
that an outlier costs precision in its own block of its own token alone. e4m3 has 3 bits
after the leading one, and its smallest step is 2**-9, so the error of an element is at
most the larger of 1/16 of itself and 2**-10 of the scale.

Dimensions: D hidden, B = ceil(D / 128) blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128
DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0  # there is no infinity; converting 465 gives NaN


class Quantized(NamedTuple):
    """e4m3 [..., D], and the float32 scales [..., B] to multiply its blocks with."""

    data: jax.Array
    scale: jax.Array


def num_blocks(dim: int) -> int:
    """How many blocks cover `dim` elements; the last one may be shorter."""
    return -(-dim // BLOCK)


def quantize(x: jax.Array) -> Quantized:
    """Blocks of 1x128 along the last dimension. NaN and infinity make a block NaN."""
    blocks = _blocks(x.astype(jnp.float32))
    # The smallest normal number keeps the scale of a block of zeros from being zero.
    tiny = jnp.finfo(jnp.float32).tiny
    scale = jnp.maximum(jnp.abs(blocks).max(-1) / LARGEST, tiny)
    # Above 448 by a rounding at most, which the conversion rounds away.
    quotient = blocks / scale[..., None]
    return Quantized(_rows(quotient, x.shape).astype(DTYPE), scale)


def dequantize(x: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`data * scale`, multiplied in float32 and then converted."""
    product = _blocks(x.data.astype(jnp.float32)) * x.scale[..., None]
    return _rows(product, x.data.shape).astype(dtype)


def _blocks(x: jax.Array) -> jax.Array:
    """[..., D] as [..., B, BLOCK], the last block filled with zeros."""
    dim = x.shape[-1]
    missing = num_blocks(dim) * BLOCK - dim
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def _rows(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]
