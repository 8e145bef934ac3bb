"""Products of each expert's rows in bfloat16, as kernels for Hopper GPUs.

    y = x @ w of the row's expert      dot: forward, and with w transposed, the inputs'
    dw = x.T @ dy of the expert's rows    outer: the weights'

A tile is ROWS x COLUMNS results, of which a warpgroup has half of the rows. Weights and
rows are taken as they lie in memory: tensor cores read bfloat16 transposed as well.

Rows are sorted by expert. `dot` has tiles of each expert's rows, and stores those only.
`outer` sums an expert's rows from the first one on. Copies start at a multiple of
ALIGNED, so that the first step, too, may hold others' rows; `outer` sets them to zero
in shared memory.

Dimensions: M row, E expert, K summed and N output of dot, I input and O output of
outer, T task.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.ops.kernels import stream
from jmoe.ops.kernels.launch import WARPGROUPS
from jmoe.ops.kernels.stream import fill
from jmoe.ops.rows import ROW_TILE, row_tiles

ROWS = ROW_TILE
OWN_ROWS = ROWS // WARPGROUPS
COLUMNS = 256
STEP = 64  # of what is summed; columns of arrays are a multiple of it
STAGES = 4  # steps whose operands are in shared memory
STORED = 128  # bytes of a row of results that are in shared memory at a time
SLOTS = 2  # of them
SNAKE = 4
ALIGNED = 8  # rows that copies start at
PART_ROWS = 8, 1  # that are stored at a time of a tile that is only partly its own


@functools.partial(jax.jit, static_argnames="transposed")
def dot(
    x_MK: jax.Array, w: jax.Array, size_E: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """Returns each expert's rows times its weights, [M, N] in x's dtype.

    The first `size_E[0]` rows are the first expert's, and so on; rows that follow the
    last expert's have anything.

    Args:
      w: [E, K, N], or [E, N, K] if transposed.
    """
    M, N = x_MK.shape[0], w.shape[1 if transposed else 2]
    x_MK, w = fill(x_MK, ALIGNED, STEP), fill(w, 1, STEP, STEP)
    task_T4 = row_tiles(size_E, M, aligned=ALIGNED)
    tiles = tiles_of(task_T4.shape[0], N)

    def kernel(task_gmem, x_gmem, w_gmem, y_gmem, x_smem, w_smem, *rest):
        ready, consumed, y_smem = rest

        def steps(index):
            task, _ = tiles.place(index)
            exists = task_gmem[task, 2] < task_gmem[task, 3]
            return jnp.where(exists, x_gmem.shape[1] // STEP, 0)

        def fetch(index):
            task, n = tiles.place(index)
            expert, row = task_gmem[task, 0], task_gmem[task, 1]
            rows = pl.ds(pl.multiple_of(row, ALIGNED), ROWS)
            columns = pl.ds(n * COLUMNS, COLUMNS)

            def of_step(k, stage, barrier):
                summed = pl.ds(k * STEP, STEP)
                of_w = (columns, summed) if transposed else (summed, columns)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[rows, summed],
                    x_smem.at[stage],
                    barrier,
                    collective_axes=tiles.shared,
                )
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[expert, *of_w], w_smem.at[stage], barrier
                )

            return of_step

        def compute(index, loop):
            own = pl.ds(lax.axis_index("warpgroup") * OWN_ROWS, OWN_ROWS)

            def product(acc, k, stage):
                w = w_smem.at[stage]
                plgpu.wgmma(acc, x_smem.at[stage, own], w.T if transposed else w)

            result = summed_up(loop, product)
            task, n = tiles.place(index)
            row, first, end = (task_gmem[task, i] for i in range(1, 4))

            @pl.when(first < end)
            def _():
                def to(smem, columns):
                    copy_range(smem, y_gmem, columns, row, first, end)

                store(result, y_smem, n, to)

        stream.run(tiles, steps, fetch, compute, ready, consumed, STAGES)

    shape = x_MK.shape[0], w.shape[1 if transposed else 2]
    blocks = (ROWS, STEP), (COLUMNS, STEP) if transposed else (STEP, COLUMNS)
    out = jax.ShapeDtypeStruct(shape, x_MK.dtype)
    call = make(kernel, "grouped_dot", out, x_MK.dtype, tiles, *blocks)
    return call(task_T4, x_MK, w)[:M, :N]


def dot_transposed(dy_MO: jax.Array, w_EIO: jax.Array, size_E: jax.Array) -> jax.Array:
    """Returns each expert's rows times its weights' transpose, [M, I]; see `dot`."""
    return dot(dy_MO, w_EIO, size_E, transposed=True)


@functools.partial(jax.jit, static_argnames="dtype")
def outer(
    x_MI: jax.Array,
    dy_MO: jax.Array,
    size_E: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Returns each expert's sum of its rows' outer products, [E, I, O] in `dtype`.

    Rows must be finite: what isn't can spoil their neighbours' experts, too.
    """
    inputs, outputs, experts = x_MI.shape[1], dy_MO.shape[1], size_E.shape[0]
    size_E = size_E.astype(jnp.int32)
    end_E = jnp.cumsum(size_E)
    range_E2 = jnp.stack([end_E - size_E, end_E], 1)
    x_MI, dy_MO = (fill(x, ALIGNED, STEP) for x in (x_MI, dy_MO))
    tiles_I = -(-inputs // ROWS)
    tiles = tiles_of(experts * tiles_I, outputs)

    def kernel(range_gmem, x_gmem, dy_gmem, w_gmem, x_smem, dy_smem, *rest):
        ready, consumed, w_smem = rest
        place = functools.partial(place_of_expert, tiles, tiles_I)

        def rows_of(index):
            expert, _, _ = place(index)
            first, end = range_gmem[expert, 0], range_gmem[expert, 1]
            return lax.div(first, ALIGNED) * ALIGNED, first, end

        def steps(index):
            start, first, end = rows_of(index)
            return jnp.where(first < end, lax.div(end - start + STEP - 1, STEP), 0)

        def fetch(index):
            _, i, o = place(index)
            start, _, _ = rows_of(index)

            def of_step(k, stage, barrier):
                rows = pl.ds(pl.multiple_of(start + k * STEP, ALIGNED), STEP)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[rows, pl.ds(i * ROWS, ROWS)],
                    x_smem.at[stage],
                    barrier,
                    collective_axes=tiles.shared,
                )
                plgpu.copy_gmem_to_smem(
                    dy_gmem.at[rows, pl.ds(o * COLUMNS, COLUMNS)],
                    dy_smem.at[stage],
                    barrier,
                )

            return of_step

        def compute(index, loop):
            own = pl.ds(lax.axis_index("warpgroup") * OWN_ROWS, OWN_ROWS)
            start, first, end = rows_of(index)

            def product(acc, k, stage):
                x = x_smem.at[stage, :, own]
                row = start + k * STEP

                @pl.when((row < first) | (row + STEP > end))
                def _():
                    row_RI = row + lax.broadcasted_iota(jnp.int32, x.shape, 0)
                    is_own_RI = (row_RI >= first) & (row_RI < end)
                    x[...] = jnp.where(is_own_RI, x[...], 0)
                    plgpu.commit_smem()

                plgpu.wgmma(acc, x.T, dy_smem.at[stage])

            result = summed_up(loop, product)
            expert, i, o = place(index)
            rows = pl.ds(i * ROWS + lax.axis_index("warpgroup") * OWN_ROWS, OWN_ROWS)

            def to(smem, columns):
                plgpu.copy_smem_to_gmem(smem, w_gmem.at[expert, rows, columns])

            store(result, w_smem, o, to)

        stream.run(tiles, steps, fetch, compute, ready, consumed, STAGES)

    shape = experts, x_MI.shape[1], dy_MO.shape[1]
    blocks = (STEP, ROWS), (STEP, COLUMNS)
    out = jax.ShapeDtypeStruct(shape, dtype)
    call = make(kernel, "grouped_outer", out, x_MI.dtype, tiles, *blocks)
    return call(range_E2, x_MI, dy_MO)[:, :inputs, :outputs]


def tiles_of(rows: int, outputs: int) -> stream.Tiles:
    return stream.Tiles(rows, -(-outputs // COLUMNS), SNAKE)


def summed_up(loop: stream.Loop, product: Any) -> Any:
    """Returns [OWN_ROWS, COLUMNS] float32, of what the steps' products add."""

    def scope(acc):
        loop.accumulate(functools.partial(product, acc))
        return acc[...]

    return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((OWN_ROWS, COLUMNS)))


def place_of_expert(tiles: stream.Tiles, tiles_I: int, index: Any):
    """Returns the expert, and the tile of its weights' gradient, tile after tile.

    Tiles are computed in turn.
    """
    of_expert = tiles._replace(rows=tiles_I)
    expert = lax.div(index, of_expert.clusters)
    return expert, *of_expert.place(lax.rem(index, of_expert.clusters))


def store(result: Any, y_smem: Any, n: Any, to: Callable[[Any, Any], None]) -> None:
    """Stores this warpgroup's rows of tile n.

    `to` does it, given shared memory and the result's columns.

    It does so by `to(shared memory, the result's columns)`.
    """
    stored = y_smem.shape[-1]
    for part in range(COLUMNS // stored):
        smem = y_smem.at[lax.axis_index("warpgroup"), part % SLOTS]
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        smem[...] = result[:, part * stored : (part + 1) * stored].astype(smem.dtype)
        plgpu.commit_smem()
        to(smem, pl.ds(n * COLUMNS + part * stored, stored))


def copy_range(
    smem: Any, y_gmem: Any, columns: Any, row: Any, first: Any, end: Any
) -> None:
    """Copies this warpgroup's rows of a tile from `row` on that are in [first, end).

    A copy's size is to be known to the compiler, which takes its time for each.
    """
    rows = smem.shape[0]
    start = row + lax.axis_index("warpgroup") * rows
    at = jnp.clip(first - start, 0, rows)
    left = jnp.clip(end - start, 0, rows) - at
    for size in (rows, *PART_ROWS):

        def copy(i, at, size=size):
            to = y_gmem.at[pl.ds(start + at, size), columns]
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(at, size)], to, commit_group=False)
            return at + size

        at = lax.fori_loop(0, lax.div(left, jnp.int32(size)), copy, at)
        left = lax.rem(left, jnp.int32(size))
    plgpu.commit_smem_to_gmem_group()


def make(kernel, name, out, dtype, tiles, *blocks) -> Any:
    """Returns a function of arrays from a kernel of blocks in `dtype` and tiles."""
    stored = STORED // jnp.dtype(out.dtype).itemsize
    return stream.make(
        kernel,
        name,
        out,
        tiles,
        [jax.ShapeDtypeStruct(block, dtype) for block in blocks],
        [plgpu.SMEM((WARPGROUPS, SLOTS, OWN_ROWS, stored), out.dtype)],
        STAGES,
    )
