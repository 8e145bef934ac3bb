"""The product of two block-scaled FP8 matrices, as a kernel for Hopper GPUs.

    y = a @ b.T,   a [M, K], b [N, K] e4m3, scales along K for each 128 of it

A block of threads computes TILE x TILE results. One warpgroup fetches steps of BLOCK
along K to shared memory, STAGES ahead. Two others multiply, half of the rows each: what
tensor cores sum in a step, with the 14 bits or so that they keep, is multiplied by the
step's scales and added up in float32 registers (DeepSeek-V3, arXiv 2412.19437, section
3.3.2). While one of them does so, the other keeps the tensor cores busy.

Tiles are as large as registers allow: of a thread's, 64 hold sums, as many the step's
products, and of ROW scales of b there are 32 more.

Dimensions: M row of a, N row of b, K summed, B = ceil(K / 128) blocks.
"""

import functools
from typing import Any

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

# Layouts are inferred: the default from JAX 0.12 on.
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


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
    is_row = b_scale.shape[0] == N and N > 1
    a_MK, b_NK = (fill(x, TILE, BLOCK) for x in (a_MK, b_NK))
    # A tile's scales for a step are to be next to each other in memory.
    a_scale_BM = fill(a_scale_MB.T, 1, TILE)
    b_scale = fill(b_scale.T, 1, TILE) if is_row else b_scale
    shape = a_MK.shape[0], b_NK.shape[0]
    kernel = plgpu.kernel(
        functools.partial(_kernel, is_row=is_row),
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=[plgpu.SMEM((WARPGROUPS, ROWS, TILE), dtype)],
        grid=(shape[0] // TILE * (shape[1] // TILE),),
        grid_names=("tile",),
        kernel_name="fp8_matmul",
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=PARAMS,
    )
    return kernel(a_MK, a_scale_BM, b_NK, b_scale)[:M, :N]


def _kernel(a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, y_smem, *, is_row):
    # Blocks that run at the same time share rows of a and of b, which caches then hold.
    tiles = y_gmem.shape[0] // TILE, y_gmem.shape[1] // TILE
    m, n = plgpu.planar_snake(lax.axis_index("tile"), tiles, 1, SNAKE)
    warpgroup = lax.axis_index("warpgroup")

    def store(pipeline):
        y_smem[warpgroup] = pipeline(zeros()).astype(y_smem.dtype)
        plgpu.commit_smem()
        rows = pl.ds(m * TILE + warpgroup * ROWS, ROWS)
        to = y_gmem.at[rows, pl.ds(n * TILE, TILE)]
        plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], to)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    multiply((a_gmem, a_scale_gmem, b_gmem, b_scale_gmem), m, n, store, is_row=is_row)


def multiply(refs: Any, m: Any, n: Any, store: Any, *, is_row: bool):
    """Tile (m, n) of the product: `store` is given what returns its sum.

    To be called by all warpgroups; `store` is called by those that multiply, with a
    function of the first value of a warpgroup's [ROWS, TILE] float32.
    """
    a_gmem, a_scale_gmem, b_gmem, b_scale_gmem = refs
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(warpgroup * ROWS, ROWS)

    def step(indices, a_smem, a_scale_smem, b_smem, *rest):
        (k,) = indices
        *of_b, sum_RN = rest
        # Read before the product, so that memory's answer isn't waited for after it.
        scale_R = a_scale_smem[rows]
        of_square = 1.0 if is_row else b_scale_gmem[n, k]

        def product(acc):
            plgpu.wgmma(acc, a_smem.at[rows], b_smem.T)
            return acc[...]

        product_RN = pl.run_scoped(
            product, plgpu.WGMMAAccumulatorRef(sum_RN.shape, jnp.float32)
        )
        scale_R *= of_square
        product_RN *= lax.broadcast_in_dim(scale_R, sum_RN.shape, (0,))
        if is_row:
            product_RN *= lax.broadcast_in_dim(of_b[0][...], sum_RN.shape, (1,))
        return sum_RN + product_RN

    scales = [plgpu.BlockSpec((None, TILE), lambda k: (k, n))] if is_row else []
    pipeline = plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(a_gmem.shape[1] // BLOCK,),
        in_specs=[
            plgpu.BlockSpec((TILE, BLOCK), lambda k: (m, k)),
            plgpu.BlockSpec((None, TILE), lambda k: (k, m)),
            plgpu.BlockSpec((TILE, BLOCK), lambda k: (n, k)),
            *scales,
        ],
        max_concurrent_steps=STAGES,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        memory_registers=FETCH_REGISTERS,
        compute_context=store,
    )
    pipeline(a_gmem, a_scale_gmem, b_gmem, *([b_scale_gmem] if is_row else []))


def zeros() -> jax.Array:
    return jnp.zeros((ROWS, TILE), jnp.float32)


def fill(x: jax.Array, *multiples: int) -> jax.Array:
    """With zeros after the end, to multiples of these sizes."""
    missing = (-size % of for size, of in zip(x.shape, multiples, strict=True))
    return jnp.pad(x, [(0, count) for count in missing])
