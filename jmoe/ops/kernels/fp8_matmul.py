"""The product of two block-scaled FP8 matrices, as a kernel for Hopper GPUs.

    y = a @ b.T,   a [M, K], b [N, K] e4m3, scales along K for each 128 of it

A tile is TILE x TILE results, of which a warpgroup has half of the rows: what tensor
cores sum in a step of BLOCK along K, with the 14 bits or so that they keep, is
multiplied by the step's scales and added up in float32 registers (DeepSeek-V3, arXiv
2412.19437, section 3.3.2). While one warpgroup does so, the other keeps the tensor
cores busy.

Tiles are as large as registers allow: of a thread's, 64 hold sums, as many the step's
products, and of ROW scales of b there are 32 more.

Dimensions: M row of a, N row of b, K summed, B = ceil(K / 128) blocks, R row of a
warpgroup's.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.ops.kernels import stream
from jmoe.ops.kernels.launch import WARPGROUPS
from jmoe.ops.kernels.stream import fill

BLOCK = 128  # that a scale covers
TILE = 128  # rows of a and of b
ROWS = TILE // WARPGROUPS
STAGES = 4  # steps whose operands are in shared memory
SNAKE = 8


@functools.partial(jax.jit, static_argnames="dtype")
def matmul(
    a_MK: jax.Array,
    a_scale_MB: jax.Array,
    b_NK: jax.Array,
    b_scale: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Returns `a @ b.T`, [M, N] in `dtype`, of e4m3 and their float32 scales.

    b's scales are [N, B], or [ceil(N / 128), B] for squares. Sizes are at least 1; what
    fills the last tiles is zeros.
    """
    M, N = a_MK.shape[0], b_NK.shape[0]
    by_row = b_scale.shape[0] == N and N > 1
    a_MK, b_NK = (fill(x, TILE, BLOCK) for x in (a_MK, b_NK))
    b_scale = row_scale(b_scale) if by_row else b_scale
    tiles = tiles_of(tile_count(a_MK, 0), b_NK.shape[0])

    def kernel(a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, *shared):
        steps = tile_count(a_gmem, 1)

        def fetch(index):
            m, n = tiles.place(index)

            def of_step(k, copies):
                of_row = (b_scale_gmem.at[k, tile(n)],) if by_row else ()
                copies.a(a_gmem.at[tile(m), tile(k)], a_scale_gmem.at[k, tile(m)])
                copies.b(b_gmem.at[tile(n), tile(k)], *of_row)

            return of_step

        def scale_of(index):
            _, n = tiles.place(index)
            return lambda k: 1.0 if by_row else b_scale_gmem[n, k]

        def store(index, total, y_smem):
            m, n = tiles.place(index)
            store_rows(total, y_smem, y_gmem.at[tile(m), tile(n)])

        run(tiles, lambda index: steps, fetch, scale_of, store, shared)

    shape = a_MK.shape[0], b_NK.shape[0]
    call = make(kernel, "fp8_matmul", shape, dtype, tiles, by_row)
    return call(a_MK, row_scale(a_scale_MB), b_NK, b_scale)[:M, :N]


class Copies(NamedTuple):
    """Starts those of a step's operands to their stage."""

    a_smem: Any
    a_scale_smem: Any
    b_smem: Any
    b_scale_smem: list[Any]
    barrier: Any
    shared: Any  # the axis of blocks that need the same a

    def a(self, data: Any, scale: Any) -> None:
        plgpu.copy_gmem_to_smem(
            data, self.a_smem, self.barrier, collective_axes=self.shared
        )
        plgpu.copy_gmem_to_smem(scale, self.a_scale_smem, self.barrier)

    def b(self, *refs: Any) -> None:
        """Copies the data, and the scales if they are of rows."""
        for x, smem in zip(refs, (self.b_smem, *self.b_scale_smem), strict=True):
            plgpu.copy_gmem_to_smem(x, smem, self.barrier)


def run(
    tiles: stream.Tiles,
    steps: Callable[[Any], Any],
    fetch: Callable[[Any], Callable[[Any, Copies], None]],
    scale_of: Callable[[Any], Callable[[Any], Any]],
    store: Callable[[Any, Any, Any], None],
    shared: Any,
) -> None:
    """Sums the products of tiles of a and b, for all of this block's tiles.

    Args:
      steps: of a tile's index, how many there are.
      fetch: of a tile's index, what starts the copies of a step.
      scale_of: of a tile, and then a step, the scale of b's square, or 1.
      store: of a tile, stores this warpgroup's sums, float32 [ROWS, TILE], through its
        shared memory.
      shared: what `make` gives a kernel; b's scales are in it, if they are of rows.
    """
    a_smem, a_scale_smem, b_smem, *b_scale_smem, ready, consumed, y_smem = shared

    def copy(index):
        of_tile = fetch(index)

        def of_step(k, stage, barrier):
            copies = Copies(
                a_smem.at[stage],
                a_scale_smem.at[stage],
                b_smem.at[stage],
                [x.at[stage] for x in b_scale_smem],
                barrier,
                tiles.shared,
            )
            of_tile(k, copies)

        return of_step

    def compute(index, loop):
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(warpgroup * ROWS, ROWS)
        of_tile = scale_of(index)

        def step(k, stage, release, sum_RN):
            # Read before the product, so that memory's answer isn't waited for after.
            scale_R = a_scale_smem[stage, rows] * of_tile(k)
            scale_N = [x[stage] for x in b_scale_smem]

            def product(acc):
                plgpu.wgmma(acc, a_smem.at[stage, rows], b_smem.at[stage].T)
                return acc[...]

            accumulator = plgpu.WGMMAAccumulatorRef((ROWS, TILE), jnp.float32)
            product_RN = pl.run_scoped(product, accumulator)
            release()
            for scale in scale_N:
                product_RN *= lax.broadcast_in_dim(scale, sum_RN.shape, (1,))
            return sum_RN + product_RN * lax.broadcast_in_dim(
                scale_R, sum_RN.shape, (0,)
            )

        total = loop(step, jnp.zeros((ROWS, TILE), jnp.float32))
        store(index, total, y_smem.at[warpgroup])

    stream.run(tiles, steps, copy, compute, ready, consumed, STAGES)


def put(total: Any, y_smem: Any) -> None:
    """Copies from this warpgroup's shared memory, once the last tile's copies are."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    y_smem[...] = total.astype(y_smem.dtype)
    plgpu.commit_smem()


def store_rows(total: Any, y_smem: Any, y_gmem: Any) -> None:
    """Stores this warpgroup's rows of a tile."""
    put(total, y_smem)
    rows = pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[rows])


def make(
    kernel: Callable[..., None],
    name: str,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    tiles: stream.Tiles,
    by_row: bool,
) -> Callable[..., jax.Array]:
    """Returns a function of arrays from a kernel of them, its result and `run`'s input.

    Args:
      by_row: whether b's scales are of rows.
    """
    data = jax.ShapeDtypeStruct((TILE, BLOCK), jnp.float8_e4m3fn)
    scale = jax.ShapeDtypeStruct((TILE,), jnp.float32)
    operands = [data, scale, data] + [scale] * by_row
    out = jax.ShapeDtypeStruct(shape, dtype)
    results = plgpu.SMEM((WARPGROUPS, ROWS, TILE), dtype)
    return stream.make(kernel, name, out, tiles, operands, [results], STAGES)


def tiles_of(rows: int, outputs: int) -> stream.Tiles:
    return stream.Tiles(rows, outputs // TILE, SNAKE)


def tile(index: Any) -> Any:
    return pl.ds(index * TILE, TILE)


def tile_count(x: Any, dim: int) -> int:
    """Returns how many tiles a size has that is a multiple of TILE."""
    return x.shape[dim] // TILE


def row_scale(scale_MB: jax.Array) -> jax.Array:
    """Returns scales [B, M], filled to tiles: a step's lie next to each other."""
    return fill(scale_MB.T, 1, TILE)
