"""Blocks of an array that share a scale: where they are, and what their scales are.

    x = data * scale,   scale = max |x of the block| / the format's largest number

Scales are taken from the numbers at hand: nothing saturates. A block that holds NaN or
infinity has a scale that isn't finite, and becomes NaN.

Dimensions: K the last one, M that before it, B = ceil(K / 128) blocks.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.formats import Format, nearest

BLOCK = 128

Block = tuple[int, ...]
"""Sizes of a block along the last dimensions: 1, BLOCK or WHOLE."""

WHOLE = -1
ROW: Block = (BLOCK,)
SQUARE: Block = (BLOCK, BLOCK)
TENSOR: Block = (WHOLE, WHOLE)


def transposed(block: Block) -> Block:
    """Returns the blocks of a matrix's transpose, which need not be transposed."""
    return (*(1,) * (2 - len(block)), *block)[::-1]


def num_blocks(dim: int) -> int:
    """Returns how many blocks cover `dim` elements; the last one may be shorter."""
    return -(-dim // BLOCK)


def scale_of(largest: jax.Array, format: Format, power_of_two: bool) -> jax.Array:
    """Returns the scales of blocks whose largest magnitudes these are, in float32.

    A power of two is the next that isn't smaller.
    """
    # Not a division, for which XLA takes this product on some platforms.
    scale = jnp.maximum(largest * (1 / format.largest), format.smallest_scale)
    return _round_up(scale) if power_of_two else scale


def _round_up(scale: jax.Array) -> jax.Array:
    """Returns each number rounded up to a power of two.

    The bits of a positive float32 are in its numbers' order.
    """
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    mantissa = (1 << 23) - 1
    up = (bits + mantissa) & ~mantissa
    # NaN and infinity have the largest exponent, and stay what they are.
    is_finite = scale < jnp.inf
    return jnp.where(is_finite, lax.bitcast_convert_type(up, jnp.float32), scale)


def scaled(x: jax.Array, block: Block, format: Format, power_of_two: bool):
    """Returns tiles of x divided by their scales; the scales; the tiles' axes.

    Above the format's largest number by a rounding at most, which a conversion rounds
    away.
    """
    tiles, axes = cut(x.astype(jnp.float32), block)
    largest = jnp.abs(tiles).max(axes, keepdims=True, initial=0.0)
    scale = scale_of(largest, format, power_of_two)
    return tiles / scale, scale, axes


def rounded(
    x: jax.Array, block: Block, format: Format, *, power_of_two: bool
) -> jax.Array:
    """Returns what a format leaves of x, in float32."""
    tiles, scale, axes = scaled(x, block, format, power_of_two)
    return join(nearest(tiles, format) * scale, axes, x.shape)


def cut(x: jax.Array, block: Block) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns [..., n, size, ...] for the block's dimensions, filled with zeros; axes.

    A dimension whose blocks are single elements stays one.
    """
    lead = x.ndim - len(block)
    shape, padding, axes = list(x.shape[:lead]), [(0, 0)] * lead, []
    for dim, size in zip(x.shape[lead:], block, strict=True):
        if size == 1:
            shape.append(dim)
            padding.append((0, 0))
            continue
        size = dim if size == WHOLE else min(size, max(dim, 1))
        count = -(-dim // size) if size else 1
        shape += [count, size]
        padding.append((0, count * size - dim))
        axes.append(len(shape) - 1)
    return jnp.pad(x, padding).reshape(shape), tuple(axes)


def join(tiles: jax.Array, axes: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Returns what `cut` made of an array of this shape."""
    merged = list(tiles.shape)
    for axis in reversed(axes):
        merged[axis - 1 : axis + 1] = [merged[axis - 1] * merged[axis]]
    return tiles.reshape(merged)[tuple(slice(size) for size in shape)]


def block_of(shape: Sequence[int], scale_shape: Sequence[int]) -> Block:
    """Returns the block of all dimensions, as the shape of an array's scales has it."""

    def size(dim: int, count: int) -> int:
        if count == num_blocks(dim):
            return BLOCK
        return 1 if count == dim else WHOLE

    return tuple(map(size, shape, scale_shape))
