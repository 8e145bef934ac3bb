"""Products of each expert's rows in block-scaled FP8: a kernel's, or a reference.

    dot      each row times its expert's weights
    outer    each expert's sum of its rows' outer products

Rows are sorted by expert; what follows the last expert's is nobody's. The kernels are
for Hopper GPUs (`jmoe.ops.kernels.fp8_grouped`), chosen when lowered, as in
`jmoe.ops.fp8.matmul`. The reference is `lax.ragged_dot` of what the operands stand for,
in float32.

Shapes: M row, E expert, K summed and N output of dot, I input and O output of outer; T
tile of rows, P row of all tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import fp8
from jmoe.ops.blocks import BLOCK, num_blocks
from jmoe.ops.by_platform import by_platform
from jmoe.ops.fp8 import Quantized, Recipe
from jmoe.ops.rows import DOT_TRANSPOSED, OUTER, num_row_tiles, row_tiles


def dot(
    x: Quantized, w: Quantized, size_E: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns [M, N] of x [M, K] and w [E, N, K]; nobody's rows have anything."""
    (M, K), (E, N, _) = x.shape, w.shape
    of_blocks = (M, num_blocks(K)), (E, num_blocks(N), num_blocks(K))
    fits = (x.scale.shape, w.scale.shape) == of_blocks

    def kernel(x, w, size_E):
        from jmoe.ops.kernels import fp8_grouped

        return fp8_grouped.dot(*x, *w, size_E, dtype=dtype)

    reference = functools.partial(_dot_reference, dtype=dtype)
    return by_platform(kernel, reference, x, w, size_E, fits=fits)


def outer(
    x_MI: jax.Array,
    dy_MO: jax.Array,
    size_E: jax.Array,
    recipe: Recipe,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Returns [E, I, O] in `dtype`; both operands are quantized here, along the rows.

    A block is what an expert has of a tile of 128 rows.
    """
    tile_T4 = row_tiles(size_E, x_MI.shape[0], aligned=BLOCK)
    count_E = num_row_tiles(size_E, aligned=BLOCK)

    def kernel(x, dy, count_E):
        from jmoe.ops.kernels import fp8_grouped

        return fp8_grouped.outer(*x, *dy, count_E, dtype=dtype)

    x = _along_rows(x_MI, tile_T4, recipe, recipe.activations)
    dy = _along_rows(dy_MO, tile_T4, recipe, recipe.gradients)
    of_blocks = [(rows.shape[0], num_blocks(rows.shape[1])) for rows in (x, dy)]
    fits = [x.scale.shape, dy.scale.shape] == of_blocks
    reference = functools.partial(_outer_reference, dtype=dtype)
    return by_platform(kernel, reference, x, dy, count_E, fits=fits)


def _along_rows(
    x_MI: jax.Array, tile_T4: jax.Array, recipe: Recipe, block: fp8.Block
) -> Quantized:
    """Returns [I, P] of the tiles' own rows, one tile after another."""

    def kernel(x_MI, tile_T4):
        from jmoe.ops.kernels import fp8_quantize

        return Quantized(
            *fp8_quantize.columns(x_MI, tile_T4, power_of_two=recipe.power_of_two)
        )

    def reference(x_MI, tile_T4):
        row_TR = tile_T4[:, 1:2] + jnp.arange(BLOCK, dtype=jnp.int32)
        is_own_TR = (row_TR >= tile_T4[:, 2:3]) & (row_TR < tile_T4[:, 3:])
        row_P = jnp.where(is_own_TR, row_TR, 0).reshape(-1)
        rows_PI = x_MI.at[row_P].get(mode="promise_in_bounds")
        return recipe.quantize(jnp.where(is_own_TR.reshape(-1, 1), rows_PI, 0).T, block)

    fits = fp8.has_kernel(x_MI, block)
    return by_platform(kernel, reference, x_MI, tile_T4, fits=fits)


def _dot_reference(x, w, size_E, *, dtype):
    return _ragged_dot(DOT_TRANSPOSED, _wide(x), _wide(w), size_E).astype(dtype)


def _outer_reference(x, dy, count_E, *, dtype):
    return _ragged_dot(OUTER, _wide(x).T, _wide(dy).T, count_E * BLOCK).astype(dtype)


def _wide(x: Quantized) -> jax.Array:
    return fp8.dequantize(x, jnp.float32)


def _ragged_dot(dimensions, left, right, size_E):
    return lax.ragged_dot_general(
        left, right, size_E, dimensions, precision=lax.Precision.HIGHEST
    )
