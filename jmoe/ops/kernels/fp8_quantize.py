"""Block-scaled FP8 of an array's rows, or of its columns, as a kernel for Hopper GPUs.

    rows       [M, K] to e4m3 [M, K], a scale for each 128 of a row
    columns    [M, I] to e4m3 [I, P], a scale for each tile of a column

What is read, and what is written, goes through shared memory once, TILE x TILE at a
time. Columns are transposed on the way, for tensor cores want e4m3 with what they sum
last.

Dimensions: M row, K and I column, B block of K, T tile of rows, P = T * TILE.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.ops.blocks import BLOCK, scale_of
from jmoe.ops.formats import E4M3
from jmoe.ops.formats import E4M3_DTYPE as DTYPE
from jmoe.ops.kernels.launch import launcher
from jmoe.ops.kernels.stream import fill

TILE = BLOCK

# JAX 0.10 can't read shared memory transposed, but for tensor cores.
READS_TRANSPOSED = jax.__version_info__ >= (0, 11)


@functools.partial(jax.jit, static_argnames="power_of_two")
def rows(x_MK: jax.Array, *, power_of_two: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the data [M, K], and the scales [M, B]."""
    M, K = x_MK.shape
    x_MK = fill(x_MK, TILE, TILE)
    grid = tuple(size // TILE for size in x_MK.shape)

    def kernel(x_gmem, q_gmem, scale_gmem, *shared):
        m, k = lax.axis_index("row"), lax.axis_index("column")
        rows, columns = pl.ds(m * TILE, TILE), pl.ds(k * TILE, TILE)
        x_MK = load(x_gmem.at[rows, columns], *shared)
        to = q_gmem.at[rows, columns], scale_gmem.at[k, rows]
        store(x_MK, 1, *to, *shared, power_of_two=power_of_two)

    scale_shape = grid[1], x_MK.shape[0]
    call = make(kernel, "fp8_rows", x_MK.shape, scale_shape, grid, x_MK.dtype)
    q_MK, scale_BM = call(x_MK)
    return q_MK[:M, :K], scale_BM[:, :M].T


@functools.partial(jax.jit, static_argnames="power_of_two")
def columns(
    x_MI: jax.Array, task_T4: jax.Array, *, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns the data [I, P], and the scales [I, T].

    Args:
      task_T4: of each tile, anything, its first row, and the range of rows that count;
        others are zero. Of those that have none, the result has anything.
    """
    inputs = x_MI.shape[1]
    x_MI = fill(x_MI, TILE, TILE)
    tasks, summed = task_T4.shape[0], 1 if READS_TRANSPOSED else 0

    def kernel(task_gmem, x_gmem, q_gmem, scale_gmem, *shared):
        t, i = lax.axis_index("row"), lax.axis_index("column")
        row, first, end = (task_gmem[t, i] for i in range(1, 4))

        @pl.when(first < end)
        def _():
            rows, columns = pl.ds(t * TILE, TILE), pl.ds(i * TILE, TILE)
            own = pl.ds(pl.multiple_of(row, TILE), TILE)
            x = load(x_gmem.at[own, columns], *shared, transposed=READS_TRANSPOSED)
            row_of = row + lax.broadcasted_iota(jnp.int32, x.shape, summed)
            x = jnp.where((row_of >= first) & (row_of < end), x, 0.0)
            place = (columns, rows) if READS_TRANSPOSED else (rows, columns)
            to = q_gmem.at[place], scale_gmem.at[t, columns]
            store(x, summed, *to, *shared, power_of_two=power_of_two)

    shape = (tasks * TILE, x_MI.shape[1])[:: -1 if READS_TRANSPOSED else 1]
    grid = tasks, x_MI.shape[1] // TILE
    scale_shape = tasks, x_MI.shape[1]
    call = make(kernel, "fp8_columns", shape, scale_shape, grid, x_MI.dtype)
    q, scale_TI = call(task_T4, x_MI)
    q_IP = q if READS_TRANSPOSED else q.T
    return q_IP[:inputs], scale_TI[:, :inputs].T


def load(
    x_gmem: Any,
    x_smem: Any,
    q_smem: Any,
    scale_smem: Any,
    barrier: Any,
    *,
    transposed: bool = False,
) -> Any:
    """Returns a tile in float32."""
    plgpu.copy_gmem_to_smem(x_gmem, x_smem, barrier)
    plgpu.barrier_wait(barrier)
    x_smem = x_smem.T if transposed else x_smem
    return plgpu.layout_cast(x_smem[...], plgpu.Layout.WGMMA).astype(jnp.float32)


def store(
    x: Any,
    summed: int,
    q_gmem: Any,
    scale_gmem: Any,
    x_smem: Any,
    q_smem: Any,
    scale_smem: Any,
    barrier: Any,
    *,
    power_of_two: bool,
) -> None:
    """Stores a tile, quantized: a scale covers all along what will be summed."""
    scale = scale_of(jnp.abs(x).max(axis=summed), E4M3, power_of_two)
    scale_smem[...] = scale
    q_smem[...] = (x / lax.broadcast_in_dim(scale, x.shape, (1 - summed,))).astype(
        DTYPE
    )
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, q_gmem)
    plgpu.copy_smem_to_gmem(scale_smem, scale_gmem)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def make(
    kernel: Any,
    name: str,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    grid: tuple[int, ...],
    dtype: Any,
) -> Any:
    """Returns a function of arrays from a kernel of refs to inputs, results, memory."""
    out = (
        jax.ShapeDtypeStruct(shape, DTYPE),
        jax.ShapeDtypeStruct(scale_shape, jnp.float32),
    )
    shared = [
        plgpu.SMEM((TILE, TILE), dtype),
        plgpu.SMEM((TILE, TILE), DTYPE),
        plgpu.SMEM((TILE,), jnp.float32),
        plgpu.Barrier(),
    ]
    blocks = {"row": grid[0], "column": grid[1]}
    return launcher(kernel, name, out, shared, blocks, warpgroups=1)
