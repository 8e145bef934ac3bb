"""Attention of one query a head to a cache of latents, as a kernel for Hopper GPUs.

    out = softmax(scale q . cache[:length]) . cache[:length, :value_dim]

All heads share keys and values, and values are a part of keys: so what is fetched of
the cache once serves both products of all heads of a tile. A block of threads has HEADS
of them and a part of a sequence, of which the next POSITIONS are under way from memory
while these are multiplied. Sequences are cut so that a few, too, keep all SMs busy;
what their parts yield is weighed by the sums of their exponentials.

The output's dimensions are divided among two warpgroups, for which there are registers.
Each computes all scores itself: half as many products again, but neither ever waits for
the other, and an H100's memory takes longer than both.

Shapes: B sequence, H head, S position, X latent and rotated dimension, C the latent's,
P part of a sequence; within a kernel, R head, K position of a step, V dimension of a
warpgroup's output.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.ops.kernels import tensor_cores
from jmoe.ops.kernels.fp8_matmul import fill

HEADS = 64  # of a block of threads
POSITIONS = 64  # in a step
STAGES = 2  # steps whose positions are in shared memory
WARPGROUPS = 2  # that multiply
FETCH_REGISTERS = 24  # of a thread that fetches; those that multiply share the rest
DIM = 64  # that X is a multiple of, and each warpgroup's part of C
MAX_DIM = 576  # of X, for which shared memory has room
MAX_VALUES = 512  # of C, for which there are registers

SMS = 132  # of an H100
EXTRA_STEPS = 4  # that starting a block, and storing and adding its result, takes
MASKED = -1e30  # finite, so that no difference is NaN


@functools.partial(jax.jit, static_argnames=("value_dim", "scale"))
def latent_decode(
    q_BHX: jax.Array,
    cache_BSX: jax.Array,
    length_B: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> jax.Array:
    """[B, H, value_dim] in q's dtype; see `jmoe.ops.latent_attention`.

    X is a multiple of DIM, and `value_dim` of WARPGROUPS * DIM.
    """
    batch, heads, _ = q_BHX.shape
    q_BHX = fill(q_BHX, 1, HEADS, 1)
    tiles = q_BHX.shape[1] // HEADS
    parts = num_parts(batch * tiles, -(-cache_BSX.shape[1] // POSITIONS))
    shape = batch, parts, tiles * HEADS
    call: Any = plgpu.kernel(
        functools.partial(_kernel, scale, tiles, parts),
        out_type=(
            jax.ShapeDtypeStruct((*shape, value_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((HEADS, q_BHX.shape[2]), q_BHX.dtype),
            plgpu.SMEM((WARPGROUPS, HEADS), jnp.float32),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        grid=(batch * parts * tiles,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="latent_decode",
        # Layouts are inferred: the default from JAX 0.12 on.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    out_BPHC, log_sum_BPH = call(length_B.astype(jnp.int32), q_BHX, cache_BSX)
    weight_BPH = jax.nn.softmax(log_sum_BPH, axis=1)
    out_BHC = (weight_BPH[..., None] * out_BPHC).sum(1)
    return out_BHC[:, :heads].astype(q_BHX.dtype)


def num_parts(sequences: int, steps: int) -> int:
    """Into how many to cut each sequence, for the least time of all SMs' blocks."""

    def time(parts):
        rounds = -(-sequences * parts // SMS)
        return rounds * (-(-steps // parts) + EXTRA_STEPS)

    return min(range(1, max(2, min(steps, SMS) + 1)), key=time)


def _kernel(scale, tiles, parts, length_gmem, q_gmem, cache_gmem, *rest):
    out_gmem, log_sum_gmem, q_smem, log_sum_smem, barrier = rest
    # Tiles of heads that need the same positions are next to each other.
    block, tile = _divide(lax.axis_index("block"), tiles)
    b, part = _divide(block, parts)
    warpgroup = lax.axis_index("warpgroup")
    length = length_gmem[b]
    steps = lax.div(length + POSITIONS - 1, POSITIONS)
    steps_of_part = lax.div(steps + parts - 1, parts)
    first = part * steps_of_part
    count = lax.max(0, lax.min(steps - first, steps_of_part))
    values = out_gmem.shape[-1] // WARPGROUPS
    columns = pl.ds(warpgroup * values, values)

    def step(indices, cache_smem, carry) -> Any:
        out_RV, top_R, total_R = carry
        s_RK = scale * math.log2(math.e) * tensor_cores.product(q_smem, cache_smem.T)
        s_RK = _mask(s_RK, length - (first + indices[0]) * POSITIONS)
        new_top_R = jnp.maximum(top_R, s_RK.max(axis=1))
        shrink_R = jnp.exp2(top_R - new_top_R)
        p_RK = jnp.exp2(s_RK - _across(new_top_R, s_RK))
        total_R = total_R * shrink_R + p_RK.sum(axis=1)
        out_RV = tensor_cores.product(
            p_RK.astype(cache_smem.dtype),
            cache_smem.at[:, columns],
            out_RV * _across(shrink_R, out_RV),
        )
        return out_RV, new_top_R, total_R

    def compute(pipeline):
        rows = HEADS // WARPGROUPS
        fetched = q_smem.at[pl.ds(warpgroup * rows, rows)]
        first_row = tile * HEADS + warpgroup * rows
        plgpu.copy_gmem_to_smem(q_gmem.at[b, pl.ds(first_row, rows)], fetched, barrier)
        plgpu.barrier_wait(barrier)
        nothing = jnp.zeros((HEADS, values), jnp.float32)
        top_R = jnp.full((HEADS,), MASKED, jnp.float32)
        out_RV, top_R, total_R = pipeline((nothing, top_R, jnp.zeros_like(top_R)))
        heads = pl.ds(tile * HEADS, HEADS)
        total_R = jnp.maximum(total_R, jnp.finfo(jnp.float32).tiny)
        out_gmem[b, part, heads, columns] = out_RV / _across(total_R, out_RV)
        log_sum_smem[warpgroup] = top_R * math.log(2) + jnp.log(total_R)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            log_sum_smem.at[warpgroup], log_sum_gmem.at[b, part, heads]
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    pipeline = plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(count,),
        in_specs=[
            plgpu.BlockSpec((POSITIONS, q_smem.shape[1]), lambda i: (first + i, 0))
        ],
        max_concurrent_steps=STAGES,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        memory_registers=FETCH_REGISTERS,
        compute_context=compute,
    )
    pipeline(cache_gmem.at[b])


def _divide(x: Any, by: int) -> tuple[Any, Any]:
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def _mask(s_RK: jax.Array, left: Any) -> jax.Array:
    """MASKED from position `left` of the step on."""

    def inside():
        position_RK = lax.broadcasted_iota(jnp.int32, s_RK.shape, 1)
        return jnp.where(position_RK < left, s_RK, MASKED)

    return lax.cond(left < POSITIONS, inside, lambda: s_RK)


def _across(x_R: jax.Array, like: jax.Array) -> jax.Array:
    """Each head's number, for all of its columns."""
    return lax.broadcast_in_dim(x_R, like.shape, (0,))
