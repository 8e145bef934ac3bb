"""Attention of one query a head to a cache of latents, as a kernel for Hopper GPUs.

    out = softmax(scale q . cache[:length]) . cache[:length, :value_dim]

where the cache of a sequence is in pages, which its row of a table lists: a step's
positions are a page's, and where that is, the warpgroup that fetches looks up.

All heads share keys and values, and values are a part of keys: so what is fetched of
the cache once serves both products of all heads of a tile. A block of threads has such
a tile and a part of a sequence, of which the next POSITIONS are under way from memory
while these are multiplied. Sequences are cut so that a few, too, keep all SMs busy;
what their parts yield is weighed by the sums of their exponentials.

The output's dimensions are divided among two warpgroups, for which there are registers.
Each computes all scores itself: half as many products again, but neither ever waits for
the other, and an H100's memory takes longer than both.

Tensor cores multiply 64 rows at a time. Of many heads, these are the rows, and what
comes out of one product goes into the next from registers. Few heads would leave rows
empty, for which an H20 has no time: they are the columns instead, of as many as there
are, and probabilities go through shared memory.

Shapes: B sequence, H head, P page, K position in one, M page of a sequence, X latent
and rotated dimension, C the latent's, S part of a sequence; within a kernel, R head of
a tile, V dimension of a warpgroup's output.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.ops.kernels import tensor_cores
from jmoe.ops.kernels.launch import WARPGROUPS, launcher
from jmoe.ops.kernels.stream import SMS, fill

ROWS = 64  # that tensor cores multiply at a time
FEW = 32  # heads that are columns
COLUMNS = 16  # that the two warpgroups can fetch
POSITIONS = 64  # in a step, and a page
STAGES = 2  # steps whose positions are in shared memory
ZEROED = 64  # dimensions of values that are in registers at a time
FETCH_REGISTERS = 24  # of a thread that fetches; those that multiply share the rest

EXTRA_STEPS = 4  # that starting a block, and storing and adding its result, takes
MASKED = -1e30  # finite, so that no difference is NaN


class _Rows(NamedTuple):
    """Many heads: scores are [R, K], and outputs [R, V]."""

    heads: int = ROWS  # of a tile
    heads_dim: int = 0
    positions_dim: int = 1

    def probabilities(self, dtype: Any) -> list[Any]:
        """Returns the shared memory that probabilities go through: none."""
        return []

    def scores(self, q_smem, cache_smem):
        return tensor_cores.product(q_smem, cache_smem.T)

    def add_values(self, out_RV, p_RK, value_smem):
        return tensor_cores.product(p_RK.astype(value_smem.dtype), value_smem, out_RV)

    def outputs(self, heads, values):
        return heads, values


class _Columns(NamedTuple):
    """Few heads: scores are [K, R], and outputs [V, R]."""

    heads: int
    heads_dim: int = 1
    positions_dim: int = 0

    def probabilities(self, dtype: Any) -> list[Any]:
        return [plgpu.SMEM((WARPGROUPS, POSITIONS, self.heads), dtype)]

    def scores(self, q_smem, cache_smem):
        return tensor_cores.product(cache_smem, q_smem.T)

    def add_values(self, out_VR, p_KR, value_smem, p_smem):
        p_smem[...] = p_KR.astype(p_smem.dtype)
        plgpu.commit_smem()
        return tensor_cores.product(value_smem.T, p_smem, out_VR)

    def outputs(self, heads, values):
        return values, heads


@functools.partial(jax.jit, static_argnames=("value_dim", "scale"))
def latent_decode(
    q_BHX: jax.Array,
    pages_PKX: jax.Array,
    table_BM: jax.Array,
    length_B: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> jax.Array:
    """Returns [B, H, value_dim] in q's dtype; see `jmoe.ops.latent_attention`.

    Args:
      pages_PKX: with POSITIONS in a page. What is in a page beyond a sequence's length
        may be anything, NaN too.
      table_BM: int32. Beyond a sequence's length, its row isn't read.
    """
    batch, heads, dim = q_BHX.shape
    form = _Columns(heads + -heads % COLUMNS) if heads <= FEW else _Rows()
    q_BHX = fill(q_BHX, 1, form.heads, 1)
    tiles = q_BHX.shape[1] // form.heads
    parts = num_parts(batch * tiles, table_BM.shape[1])
    outputs = batch, parts, *form.outputs(q_BHX.shape[1], value_dim)
    call = launcher(
        functools.partial(_kernel, form, scale, tiles),
        "latent_decode",
        (
            jax.ShapeDtypeStruct(outputs, jnp.float32),
            jax.ShapeDtypeStruct((batch, parts, q_BHX.shape[1]), jnp.float32),
        ),
        [
            plgpu.SMEM((form.heads, dim), q_BHX.dtype),
            plgpu.SMEM((WARPGROUPS, form.heads), jnp.float32),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            *form.probabilities(q_BHX.dtype),
        ],
        {"block": batch * parts * tiles},
        approx_math=True,
    )
    where_B = table_BM.astype(jnp.int32), length_B.astype(jnp.int32)
    out, log_sum_BSH = call(*where_B, q_BHX, pages_PKX)
    weight_BSH = jax.nn.softmax(log_sum_BSH, axis=1)
    out_BSHC = out if form.heads_dim == 0 else out.mT
    out_BHC = (weight_BSH[..., None] * out_BSHC).sum(1)
    return out_BHC[:, :heads].astype(q_BHX.dtype)


def num_parts(sequences: int, steps: int) -> int:
    """Returns into how many parts to cut each sequence.

    All SMs' blocks then take the least time.
    """

    def time(parts):
        rounds = -(-sequences * parts // SMS)
        return rounds * (-(-steps // parts) + EXTRA_STEPS)

    return min(range(1, max(2, min(steps, SMS) + 1)), key=time)


def _kernel(form, scale, tiles, table_gmem, length_gmem, q_gmem, pages_gmem, *rest):
    out_gmem, log_sum_gmem, q_smem, log_sum_smem, barrier, *p_smem = rest
    # Tiles of heads that need the same positions are next to each other.
    block, tile = _divide(lax.axis_index("block"), tiles)
    b, part = _divide(block, log_sum_gmem.shape[1])
    warpgroup = lax.axis_index("warpgroup")
    length = length_gmem[b]
    first, count = _steps(length, part, log_sum_gmem.shape[1])
    first_head = tile * form.heads
    num_values = out_gmem.shape[3 - form.heads_dim] // WARPGROUPS
    values = pl.ds(warpgroup * num_values, num_values)

    def across(x_R, like):
        """Returns each head's number, for all else."""
        return lax.broadcast_in_dim(x_R, like.shape, (form.heads_dim,))

    def step(indices, page_smem, carry) -> Any:
        out, top_R, total_R = carry
        s = scale * math.log2(math.e) * form.scores(q_smem, page_smem)
        left = length - (first + indices[0]) * POSITIONS
        s = _mask(s, left, form.positions_dim)
        value_smem = page_smem.at[:, values]
        _zero(value_smem, left)
        new_top_R = jnp.maximum(top_R, s.max(axis=form.positions_dim))
        shrink_R = jnp.exp2(top_R - new_top_R)
        p = jnp.exp2(s - across(new_top_R, s))
        total_R = total_R * shrink_R + p.sum(axis=form.positions_dim)
        out = form.add_values(
            out * across(shrink_R, out),
            p,
            value_smem,
            *(ref.at[warpgroup] for ref in p_smem),
        )
        return out, new_top_R, total_R

    def compute(pipeline):
        half = form.heads // WARPGROUPS
        rows = pl.ds(warpgroup * half, half)
        from_gmem = q_gmem.at[b, pl.ds(first_head + warpgroup * half, half)]
        plgpu.copy_gmem_to_smem(from_gmem, q_smem.at[rows], barrier)
        plgpu.barrier_wait(barrier)
        nothing = jnp.zeros(form.outputs(form.heads, num_values), jnp.float32)
        top_R = jnp.full((form.heads,), MASKED, jnp.float32)
        out, top_R, total_R = pipeline((nothing, top_R, jnp.zeros_like(top_R)))
        total_R = jnp.maximum(total_R, jnp.finfo(jnp.float32).tiny)
        heads = pl.ds(first_head, form.heads)
        out_gmem[b, part, *form.outputs(heads, values)] = out / across(total_R, out)
        # Both warpgroups have the same.
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
            plgpu.BlockSpec(
                (None, POSITIONS, q_smem.shape[1]),
                lambda i: (table_gmem[b, first + i], 0, 0),
            )
        ],
        max_concurrent_steps=STAGES,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        memory_registers=FETCH_REGISTERS,
        compute_context=compute,
    )
    pipeline(pages_gmem)


def _steps(length: Any, part: Any, parts: int) -> tuple[Any, Any]:
    """Returns a part's first step, and how many it has."""
    steps = lax.div(length + POSITIONS - 1, POSITIONS)
    each = lax.div(steps + parts - 1, parts)
    first = part * each
    return first, lax.max(0, lax.min(steps - first, each))


def _divide(x: Any, by: int) -> tuple[Any, Any]:
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def _mask(s: jax.Array, left: Any, positions_dim: int) -> jax.Array:
    """Masks the scores from position `left` of the step on."""

    def inside():
        position = lax.broadcasted_iota(jnp.int32, s.shape, positions_dim)
        return jnp.where(position < left, s, MASKED)

    return lax.cond(left < POSITIONS, inside, lambda: s)


def _zero(value_smem: Any, left: Any) -> None:
    """Writes zeros over the values from position `left` of the step on.

    A probability of zero is not enough where a value is NaN. To the other warpgroup
    these are keys, whose scores it masks whatever they are.
    """

    @pl.when(left < POSITIONS)
    def _():
        for start in range(0, value_smem.shape[1], ZEROED):
            some_smem = value_smem.at[:, pl.ds(start, ZEROED)]
            some = plgpu.layout_cast(some_smem[...], plgpu.Layout.WGMMA)
            position = lax.broadcasted_iota(jnp.int32, some.shape, 0)
            some_smem[...] = jnp.where(position < left, some, jnp.zeros_like(some))
        plgpu.commit_smem()
