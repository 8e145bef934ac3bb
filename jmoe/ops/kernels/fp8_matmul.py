"""The product of two block-scaled FP8 matrices, as a kernel for Hopper GPUs.

    y = a @ b.T,   a [M, K], b [N, K] e4m3, scales along K for each 128 of it

A block of threads computes TILE x TILE results. One warpgroup fetches steps of BLOCK
along K to shared memory, STAGES ahead. Two others multiply, half of the rows each: what
tensor cores sum in a step, with the 14 bits or so that they keep, is multiplied by the
step's scales and added up in float32 registers (DeepSeek-V3, arXiv 2412.19437, section
3.3.2). While one of them does so, the other keeps the tensor cores busy.

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

BLOCK = 128  # that a scale covers
TILE = 128  # rows of a and of b
STAGES = 4  # steps whose operands are under way from memory
WARPGROUPS = 2  # that multiply
ROWS = TILE // WARPGROUPS
SNAKE = 8  # tiles along N, of which all are computed before the next ones
FETCH_REGISTERS = 40  # of a thread that fetches; those that multiply share the rest


@functools.partial(jax.jit, static_argnames="dtype")
def matmul(
    a_MK: jax.Array,
    a_scale_MB: jax.Array,
    b_NK: jax.Array,
    b_scale: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`a @ b.T`, [M, N] in `dtype`, of e4m3 and their float32 scales.

    b's scales are [N, B], or [ceil(N / 128), B] for squares. Sizes are at least 1; what
    fills the last tiles is zeros.
    """
    M, N = a_MK.shape[0], b_NK.shape[0]
    by_row = b_scale.shape[0] == N and N > 1
    a_MK, b_NK = (fill(x, TILE, BLOCK) for x in (a_MK, b_NK))
    b_scale = row_scale(b_scale) if by_row else b_scale
    tiles = tiles_of(a_MK, 0), tiles_of(b_NK, 0)

    def kernel(a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, y_smem):
        m, n = snake(lax.axis_index("tile"), tiles)
        a = Operand(a_gmem, a_scale_gmem, lambda k: (m, k))
        b = Operand(b_gmem, b_scale_gmem, lambda k: (n, k), by_row)

        def store(total):
            store_tile(
                total, y_smem, lambda rows, columns: y_gmem.at[rows, columns], m, n
            )

        multiply(a, b, store, steps=tiles_of(a_gmem, 1))

    shape = a_MK.shape[0], b_NK.shape[0]
    call = make(kernel, "fp8_matmul", shape, dtype, tile=tiles[0] * tiles[1])
    return call(a_MK, row_scale(a_scale_MB), b_NK, b_scale)[:M, :N]


class Operand(NamedTuple):
    """e4m3 in memory, and the tile of it to multiply at each step.

    scale: of whole rows' blocks as `row_scale` makes it; else one for each tile.
    place: of a step k, the tile's place, counted in tiles in the last two dimensions.
    """

    data: Any
    scale: Any
    place: Callable[[jax.Array], tuple[Any, ...]]
    by_row: bool = True

    def specs(self) -> list[plgpu.BlockSpec]:
        """What is fetched to shared memory at each step."""
        lead = [None] * (len(self.data.shape) - 2)
        data = plgpu.BlockSpec((*lead, TILE, BLOCK), self.place)
        scale = plgpu.BlockSpec((None, TILE), lambda k: self.place(k)[::-1])
        return [data, scale] if self.by_row else [data]

    def refs(self) -> list[Any]:
        return [self.data, self.scale] if self.by_row else [self.data]


def multiply(a: Operand, b: Operand, store: Callable[[Any], None], *, steps: Any):
    """Sums the products of a's and b's tiles over `steps`; a's scales are by row.

    To be called by all warpgroups. Those that multiply call `store` with what returns
    their sums, [ROWS, TILE] float32.
    """
    rows = pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)

    def step(indices, a_smem, a_scale_smem, b_smem, *rest):
        *b_scale_smem, sum_RN = rest
        # Read before the product, so that memory's answer isn't waited for after it.
        scale_R = a_scale_smem[rows]
        of_tile = 1.0 if b.by_row else b.scale[b.place(*indices)]

        def product(acc):
            plgpu.wgmma(acc, a_smem.at[rows], b_smem.T)
            return acc[...]

        accumulator = plgpu.WGMMAAccumulatorRef(sum_RN.shape, jnp.float32)
        product_RN = pl.run_scoped(product, accumulator)
        scale_R *= of_tile
        product_RN *= lax.broadcast_in_dim(scale_R, sum_RN.shape, (0,))
        for scale in b_scale_smem:
            product_RN *= lax.broadcast_in_dim(scale[...], sum_RN.shape, (1,))
        return sum_RN + product_RN

    def total(pipeline):
        store(lambda: pipeline(jnp.zeros((ROWS, TILE), jnp.float32)))

    pipeline = plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        in_specs=a.specs() + b.specs(),
        max_concurrent_steps=STAGES,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        memory_registers=FETCH_REGISTERS,
        compute_context=total,
    )
    pipeline(*a.refs(), *b.refs())


def store_tile(total: Any, y_smem: Any, y_at: Any, m: Any, n: Any):
    """This warpgroup's rows of tile (m, n), to `y_at(rows, columns)` in memory."""
    warpgroup = lax.axis_index("warpgroup")
    y_smem[warpgroup] = total().astype(y_smem.dtype)
    plgpu.commit_smem()
    to = y_at(pl.ds(m * TILE + warpgroup * ROWS, ROWS), pl.ds(n * TILE, TILE))
    plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], to)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def make(
    kernel: Callable[..., None],
    name: str,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    **grid: int,
) -> Callable[..., jax.Array]:
    """A function of arrays from a kernel of them, its result [shape] and a tile of it.

    The tile is shared memory, [WARPGROUPS, ROWS, TILE]; `grid` is the blocks of
    threads, by the names of their axes.
    """
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=[plgpu.SMEM((WARPGROUPS, ROWS, TILE), dtype)],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        # Layouts are inferred: the default from JAX 0.12 on.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


def snake(index: Any, tiles: tuple[int, int]) -> tuple[Any, Any]:
    """A tile's place; blocks that run at the same time share operands, then cached."""
    return plgpu.planar_snake(index, tiles, 1, SNAKE)


def tiles_of(x: Any, dim: int) -> int:
    """How many there are of a size that is a multiple of TILE."""
    return x.shape[dim] // TILE


def fill(x: jax.Array, *multiples: int) -> jax.Array:
    """With zeros after the end, to multiples of these sizes."""
    missing = (-size % of for size, of in zip(x.shape, multiples, strict=True))
    return jnp.pad(x, [(0, count) for count in missing])


def row_scale(scale_MB: jax.Array) -> jax.Array:
    """[B, M], filled to tiles: the scales of a step lie next to each other."""
    return fill(scale_MB.T, 1, TILE)
