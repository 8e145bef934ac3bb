"""Products of each expert's rows in block-scaled FP8, as kernels for Hopper GPUs.

    y = x @ w.T of the row's expert    dot: forward, and with w transposed, the inputs'
    dw = x.T @ dy of the expert's rows    outer: the weights'

Rows are sorted by expert. `dot` has tiles of each expert's rows, and stores those only,
as in `jmoe.ops.kernels.grouped`. `outer` sums over rows, where a scale covers BLOCK of
them; so there a block is one expert's. How many each expert has is read on the device.

Tiles, steps and sums are those of `jmoe.ops.kernels.fp8_matmul`.

Dimensions: M row, E expert, K summed and N output of dot, I input and O output of
outer, B block of what is summed, C block of N, T task.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jmoe.ops.kernels import grouped
from jmoe.ops.kernels.fp8_matmul import (
    BLOCK,
    TILE,
    make,
    put,
    row_scale,
    run,
    store_rows,
    tile,
    tile_count,
    tiles_of,
)
from jmoe.ops.kernels.stream import fill
from jmoe.ops.rows import row_tiles


@functools.partial(jax.jit, static_argnames="dtype")
def dot(
    x_MK: jax.Array,
    x_scale_MB: jax.Array,
    w_ENK: jax.Array,
    w_scale_ECB: jax.Array,
    size_E: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Returns each expert's rows times its weights, [M, N] in `dtype`.

    The first `size_E[0]` rows are the first expert's, and so on; rows that follow the
    last expert's have anything. Weights have 128x128 scales.
    """
    M, N = x_MK.shape[0], w_ENK.shape[1]
    x_MK, w_ENK = fill(x_MK, TILE, BLOCK), fill(w_ENK, 1, TILE, BLOCK)
    task_T4 = row_tiles(size_E, M, aligned=grouped.ALIGNED)
    tiles = tiles_of(task_T4.shape[0], w_ENK.shape[1])

    def kernel(task_gmem, x_gmem, x_scale_gmem, w_gmem, w_scale_gmem, y_gmem, *shared):
        def steps(index):
            task, _ = tiles.place(index)
            exists = task_gmem[task, 2] < task_gmem[task, 3]
            return jnp.where(exists, tile_count(x_gmem, 1), 0)

        def fetch(index):
            task, n = tiles.place(index)
            expert, row = task_gmem[task, 0], task_gmem[task, 1]
            rows = pl.ds(pl.multiple_of(row, grouped.ALIGNED), TILE)

            def of_step(k, copies):
                copies.a(x_gmem.at[rows, tile(k)], x_scale_gmem.at[k, rows])
                copies.b(w_gmem.at[expert, tile(n), tile(k)])

            return of_step

        def scale_of(index):
            task, n = tiles.place(index)
            expert = task_gmem[task, 0]
            return lambda k: w_scale_gmem[expert, n, k]

        def store(index, total, y_smem):
            task, n = tiles.place(index)
            row, first, end = (task_gmem[task, i] for i in range(1, 4))

            @pl.when(first < end)
            def _():
                put(total, y_smem)
                grouped.copy_range(y_smem, y_gmem, tile(n), row, first, end)

        run(tiles, steps, fetch, scale_of, store, shared)

    shape = x_MK.shape[0], w_ENK.shape[1]
    call = make(kernel, "fp8_grouped_dot", shape, dtype, tiles, by_row=False)
    return call(task_T4, x_MK, row_scale(x_scale_MB), w_ENK, w_scale_ECB)[:M, :N]


@functools.partial(jax.jit, static_argnames="dtype")
def outer(
    x_IM: jax.Array,
    x_scale_IB: jax.Array,
    dy_OM: jax.Array,
    dy_scale_OB: jax.Array,
    count_E: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Returns each expert's sum of its rows' outer products, [E, I, O] in `dtype`.

    The first `count_E[0]` blocks of 128 rows are the first expert's, and so on; blocks
    that follow the last expert's aren't read. Scales are 1x128, along M.
    """
    inputs, outputs, experts = x_IM.shape[0], dy_OM.shape[0], count_E.shape[0]
    x_IM, dy_OM = (fill(x, TILE, BLOCK) for x in (x_IM, dy_OM))
    count_E = count_E.astype(jnp.int32)
    step_E2 = jnp.stack([jnp.cumsum(count_E) - count_E, count_E], 1)
    tiles_I = tile_count(x_IM, 0)
    tiles = tiles_of(experts * tiles_I, dy_OM.shape[0])

    def kernel(
        step_gmem, x_gmem, x_scale_gmem, dy_gmem, dy_scale_gmem, w_gmem, *shared
    ):
        place = functools.partial(grouped.place_of_expert, tiles, tiles_I)

        def steps(index):
            expert, _, _ = place(index)
            return step_gmem[expert, 1]

        def fetch(index):
            expert, i, o = place(index)
            first = step_gmem[expert, 0]

            def of_step(k, copies):
                rows = tile(first + k)
                copies.a(x_gmem.at[tile(i), rows], x_scale_gmem.at[first + k, tile(i)])
                copies.b(
                    dy_gmem.at[tile(o), rows], dy_scale_gmem.at[first + k, tile(o)]
                )

            return of_step

        def store(index, total, w_smem):
            expert, i, o = place(index)
            store_rows(total, w_smem, w_gmem.at[expert, tile(i), tile(o)])

        run(tiles, steps, fetch, lambda index: lambda k: 1.0, store, shared)

    shape = experts, x_IM.shape[0], dy_OM.shape[0]
    call = make(kernel, "fp8_grouped_outer", shape, dtype, tiles, by_row=True)
    scales = row_scale(x_scale_IB), row_scale(dy_scale_OB)
    return call(step_E2, x_IM, scales[0], dy_OM, scales[1])[:, :inputs, :outputs]
