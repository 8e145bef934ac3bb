"""Products of each expert's rows in block-scaled FP8: a kernel's, or a reference.

    dot      each row times its expert's weights
    outer    each expert's sum of its rows' outer products

Rows are sorted by expert; what follows the last expert's is nobody's. The kernels are
for Hopper GPUs (`jmoe.ops.kernels.fp8_grouped`), chosen when lowered, as in
`jmoe.ops.fp8.matmul`. The reference is `lax.ragged_dot` of what the operands stand for,
in float32.

Shapes: M row, E expert, K summed and N output of dot, I input and O output of outer; P
row, where each expert's rows start at a multiple of BLOCK.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import fp8
from jmoe.ops.by_platform import OURS, by_platform
from jmoe.ops.fp8 import BLOCK, Quantized, Recipe, num_blocks
from jmoe.ops.row_tasks import first_rows
from jmoe.ops.rows import DOT_TRANSPOSED, OUTER


def dot(
    x: Quantized, w: Quantized, size_E: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """[M, N] of x [M, K] and w [E, N, K]; nobody's rows have anything."""
    (M, K), (E, N, _) = x.shape, w.shape
    of_blocks = (M, num_blocks(K)), (E, num_blocks(N), num_blocks(K))
    fits = (x.scale.shape, w.scale.shape) == of_blocks

    def kernel(x, w, size_E):
        from jmoe.ops.kernels import fp8_grouped

        return fp8_grouped.dot(*x, *w, size_E, dtype=dtype)

    reference = functools.partial(_dot_reference, dtype=dtype)
    return by_platform(kernel, reference, x, w, size_E, needs=OURS, fits=fits)


def outer(
    x_MI: jax.Array, dy_MO: jax.Array, size_E: jax.Array, recipe: Recipe
) -> jax.Array:
    """[E, I, O] in x's dtype; both operands are quantized here, along the rows.

    Blocks start with each expert's first row.
    """
    row_P, is_owned_P1 = _spaced(size_E, x_MI.shape[0])

    def along_rows(rows, block):
        rows_P = rows.at[row_P].get(mode="promise_in_bounds")
        return recipe.quantize(jnp.where(is_owned_P1, rows_P, 0).T, block)

    def kernel(x, dy, size_E):
        from jmoe.ops.kernels import fp8_grouped

        return fp8_grouped.outer(*x, *dy, size_E, dtype=x_MI.dtype)

    x = along_rows(x_MI, recipe.activations)
    dy = along_rows(dy_MO, recipe.gradients)
    of_blocks = [(rows.shape[0], num_blocks(rows.shape[1])) for rows in (x, dy)]
    fits = [x.scale.shape, dy.scale.shape] == of_blocks
    reference = functools.partial(_outer_reference, dtype=x_MI.dtype)
    return by_platform(kernel, reference, x, dy, size_E, needs=OURS, fits=fits)


def _spaced(size_E: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Which row each of P is, and whether it is anybody's, [P, 1]."""
    length = (num_blocks(num_rows) + size_E.shape[0]) * BLOCK
    whole_E = _whole(size_E)
    end_E = jnp.cumsum(whole_E)
    index_P = jnp.arange(length, dtype=jnp.int32)
    expert_P = jnp.searchsorted(end_E, index_P, side="right").astype(jnp.int32)
    is_there_P = expert_P < size_E.shape[0]
    expert_P = jnp.where(is_there_P, expert_P, 0)
    nth_P = index_P - (end_E - whole_E)[expert_P]
    is_owned_P = is_there_P & (nth_P < size_E[expert_P])
    row_P = jnp.where(is_owned_P, first_rows(size_E)[expert_P] + nth_P, 0)
    return row_P, is_owned_P[:, None]


def _whole(size_E: jax.Array) -> jax.Array:
    """Rows of each expert, filled to blocks."""
    return -(-size_E // BLOCK) * BLOCK


def _dot_reference(x, w, size_E, *, dtype):
    return _ragged_dot(DOT_TRANSPOSED, _wide(x), _wide(w), size_E).astype(dtype)


def _outer_reference(x, dy, size_E, *, dtype):
    whole_E = _whole(size_E)
    return _ragged_dot(OUTER, _wide(x).T, _wide(dy).T, whole_E).astype(dtype)


def _wide(x: Quantized) -> jax.Array:
    return fp8.dequantize(x, jnp.float32)


def _ragged_dot(dimensions, left, right, size_E):
    return lax.ragged_dot_general(
        left, right, size_E, dimensions, precision=lax.Precision.HIGHEST
    )
