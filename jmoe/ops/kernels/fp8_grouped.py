"""Products of each expert's rows in block-scaled FP8, as kernels for Hopper GPUs.

    y = x @ w.T of the row's expert    dot: forward, and with w transposed, the inputs'
    dw = x.T @ dy of the expert's rows    outer: the weights'

Rows are sorted by expert. `dot` takes them as they are: a tile of rows that several
experts share is computed for each of them, and of each result only its own rows are
stored. So there are at most ceil(M / TILE) + E - 1 tasks, one for each expert of each
tile of rows; that many are launched, and those that there aren't do nothing. Which
they are is computed on the device.

`outer` sums over rows, where a scale covers BLOCK of them; so there each expert's rows
start at a multiple of that. A step is then one expert's, and an expert's number of them
is read on the device.

Tiles, steps and sums are those of `jmoe.ops.kernels.fp8_matmul`.

Dimensions: M row, E expert, K summed and N output of dot, I input and O output of
outer, B block of what is summed, S square of N, T task.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.ops.kernels.fp8_matmul import (
    BLOCK,
    ROWS,
    TILE,
    Operand,
    fill,
    make,
    multiply,
    row_scale,
    snake,
    store_tile,
    tiles_of,
)


@functools.partial(jax.jit, static_argnames="dtype")
def dot(
    x_MK: jax.Array,
    x_scale_MB: jax.Array,
    w_ENK: jax.Array,
    w_scale_ESB: jax.Array,
    size_E: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Each expert's rows times its weights, [M, N] in `dtype`.

    The first `size_E[0]` rows are the first expert's, and so on; rows that follow the
    last expert's have anything. Weights have 128x128 scales.
    """
    M, N = x_MK.shape[0], w_ENK.shape[1]
    x_MK, w_ENK = fill(x_MK, TILE, BLOCK), fill(w_ENK, 1, TILE, BLOCK)
    task_T4 = tasks(size_E, M)
    tiles = task_T4.shape[0], tiles_of(w_ENK, 1)

    def kernel(task_gmem, x_gmem, x_scale_gmem, w_gmem, w_scale_gmem, y_gmem, y_smem):
        task, n = snake(lax.axis_index("tile"), tiles)
        expert, m, first, end = (task_gmem[task, i] for i in range(4))

        @pl.when(first < end)
        def _():
            x = Operand(x_gmem, x_scale_gmem, lambda k: (m, k))
            w = Operand(w_gmem, w_scale_gmem, lambda k: (expert, n, k), by_row=False)

            def store(total):
                columns = pl.ds(n * TILE, TILE)
                _store_rows(total, y_smem, y_gmem.at[:, columns], m, first, end)

            multiply(x, w, store, steps=tiles_of(x_gmem, 1))

    shape = x_MK.shape[0], w_ENK.shape[1]
    call = make(kernel, "fp8_grouped_dot", shape, dtype, tile=tiles[0] * tiles[1])
    return call(task_T4, x_MK, row_scale(x_scale_MB), w_ENK, w_scale_ESB)[:M, :N]


@functools.partial(jax.jit, static_argnames="dtype")
def outer(
    x_IM: jax.Array,
    x_scale_IB: jax.Array,
    dy_OM: jax.Array,
    dy_scale_OB: jax.Array,
    size_E: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Each expert's sum of its rows' outer products, [E, I, O] in `dtype`.

    An expert's rows start where those before it end, at the next multiple of 128; up to
    that, one of the operands is zero and the other finite. Scales are 1x128, along M.
    """
    inputs, outputs, experts = x_IM.shape[0], dy_OM.shape[0], size_E.shape[0]
    x_IM, dy_OM = (fill(x, TILE, BLOCK) for x in (x_IM, dy_OM))
    count_E = -(-size_E.astype(jnp.int32) // BLOCK)
    step_E2 = jnp.stack([jnp.cumsum(count_E) - count_E, count_E], 1)
    tiles = tiles_of(x_IM, 0), tiles_of(dy_OM, 0)

    def kernel(step_gmem, x_gmem, x_scale_gmem, dy_gmem, dy_scale_gmem, w_gmem, w_smem):
        expert = lax.axis_index("expert")
        i, o = snake(lax.axis_index("tile"), tiles)
        first, count = step_gmem[expert, 0], step_gmem[expert, 1]
        x = Operand(x_gmem, x_scale_gmem, lambda k: (i, first + k))
        dy = Operand(dy_gmem, dy_scale_gmem, lambda k: (o, first + k))

        def store(total):
            def at(rows, columns):
                return w_gmem.at[expert, rows, columns]

            store_tile(total, w_smem, at, i, o)

        multiply(x, dy, store, steps=count)

    shape = experts, x_IM.shape[0], dy_OM.shape[0]
    grid = {"expert": experts, "tile": tiles[0] * tiles[1]}
    call = make(kernel, "fp8_grouped_outer", shape, dtype, **grid)
    scales = row_scale(x_scale_IB), row_scale(dy_scale_OB)
    return call(step_E2, x_IM, scales[0], dy_OM, scales[1])[:, :inputs, :outputs]


def tasks(size_E: jax.Array, num_rows: int) -> jax.Array:
    """[T, 4] int32: expert, tile of rows, and from which to before which row it goes.

    In the order of rows; those of no rows come last.
    """
    size_E = size_E.astype(jnp.int32)
    end_E = jnp.cumsum(size_E)
    start_E = end_E - size_E
    count_E = jnp.where(size_E > 0, -(-end_E // TILE) - start_E // TILE, 0)
    before_E = jnp.cumsum(count_E)
    task_T = jnp.arange(-(-num_rows // TILE) + size_E.shape[0] - 1, dtype=jnp.int32)
    expert_T = jnp.searchsorted(before_E, task_T, side="right").astype(jnp.int32)
    is_task_T = expert_T < size_E.shape[0]
    expert_T = jnp.where(is_task_T, expert_T, 0)
    nth_T = task_T - (before_E - count_E)[expert_T]
    tile_T = jnp.where(is_task_T, start_E[expert_T] // TILE + nth_T, 0)
    first_T = jnp.maximum(start_E[expert_T], tile_T * TILE)
    end_T = jnp.minimum(end_E[expert_T], (tile_T + 1) * TILE)
    end_T = jnp.where(is_task_T, end_T, 0)
    return jnp.stack([expert_T, tile_T, first_T, end_T], 1)


def _store_rows(total, y_smem, y_gmem, m, first, end):
    """Of this warpgroup's rows of tile m, those from `first` to before `end`."""
    warpgroup = lax.axis_index("warpgroup")
    y_smem[warpgroup] = total().astype(y_smem.dtype)
    plgpu.commit_smem()
    start = m * TILE + warpgroup * ROWS
    row = jnp.clip(first - start, 0, ROWS)
    left = jnp.clip(end - start, 0, ROWS) - row
    # A copy's size is to be known to the compiler: the number's binary digits.
    for size in (2**digit for digit in reversed(range(ROWS.bit_length()))):
        here = left & size

        @pl.when(here != 0)
        def _(row=row, size=size):
            part = y_smem.at[warpgroup, pl.ds(row, size)]
            to = y_gmem.at[pl.ds(start + row, size)]
            plgpu.copy_smem_to_gmem(part, to, commit_group=False)

        row += here
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
