"""Attention's output, and the gradient of its queries, as kernels for Hopper GPUs.

A warpgroup has ROWS queries of a head, and walks over tiles of the keys they see:
forward with FlashAttention's online softmax (arXiv 2205.14135, algorithm 1),

    p = exp(scale q k - top)             out += p v

and backward with the saved log-sum-exp (its appendix B.2),

    p = exp(scale q k - log_sum)         ds = p (d_out v - delta)
    dq += scale ds k

What comes out of one product goes into the next from registers. Forward, the product
with a tile's values is under way while the softmax of the next tile's scores is
computed: so a step takes values from the tile before its keys', and there is one step
more. Blocks with many keys start before those of their head with fewer.

Shapes: B batch, T position, H head, K head of keys and values, each of which equally
many heads share, Q query/key dimension, V value dimension; within a kernel, R query (a
warpgroup's row) and C key (a column).
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

ROWS = 64
TILE = WARPGROUPS * ROWS
KEYS = 128  # in a step forward
STAGES = 2  # steps whose operands are in shared memory
GRADIENT_KEYS = 64  # in a step backward, for which there are registers
GRADIENT_STAGES = 3
FETCH_REGISTERS = 24  # of a thread that fetches; those that multiply share the rest

MASKED = -1e30  # finite, so that no difference is NaN
LOWEST = -1e20  # largest logit so far, to which what is masked adds nothing


@functools.partial(jax.jit, static_argnames="scale")
def forward(
    q_BTHQ: jax.Array,
    k_BTKQ: jax.Array,
    v_BTKV: jax.Array,
    start_BT: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, H, V], and its float32 log-sum-exp [B, H, T].

    T is a multiple of TILE, Q and V are of 64; the scale is positive.

    Args:
      start_BT: int32, which never falls along T; a query sees no key before it. None:
        all earlier ones.
    """
    batch, length, heads, qk_dim = q_BTHQ.shape
    starts = [] if start_BT is None else [start_BT]
    call = launcher(
        functools.partial(_forward, scale),
        "attention_forward",
        (
            jax.ShapeDtypeStruct((*q_BTHQ.shape[:3], v_BTKV.shape[-1]), v_BTKV.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        [
            plgpu.SMEM((WARPGROUPS, ROWS, qk_dim), q_BTHQ.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, KEYS), jnp.int32),
            plgpu.Barrier(num_arrivals=1 + len(starts), num_barriers=WARPGROUPS),
            *_rows_of(starts),
        ],
        _grid(q_BTHQ),
        approx_math=True,
    )
    return call(q_BTHQ, k_BTKQ, v_BTKV, *starts)


@functools.partial(jax.jit, static_argnames="scale")
def gradient(
    q_BTHQ: jax.Array,
    k_BTKQ: jax.Array,
    v_BTKV: jax.Array,
    d_out_BTHV: jax.Array,
    log_sum_BHT: jax.Array,
    delta_BHT: jax.Array,
    start_BT: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    """Returns the gradient of the queries, in their dtype; see `forward`.

    Args:
      log_sum_BHT: float32, of the exponentials of a query's scaled logits.
      delta_BHT: float32, the output times its gradient, summed over V.
    """
    qk_dim, starts = q_BTHQ.shape[-1], [] if start_BT is None else [start_BT]
    call = launcher(
        functools.partial(_gradient, scale),
        "attention_queries",
        q_BTHQ,
        [
            plgpu.SMEM((WARPGROUPS, ROWS, qk_dim), q_BTHQ.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS, v_BTKV.shape[-1]), v_BTKV.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, GRADIENT_KEYS), jnp.int32),
            plgpu.Barrier(num_arrivals=4 + len(starts), num_barriers=WARPGROUPS),
            *_rows_of(starts),
        ],
        _grid(q_BTHQ),
        approx_math=True,
    )
    log_sum_BHT *= math.log2(math.e)
    operands = q_BTHQ, k_BTKQ, v_BTKV, d_out_BTHV, log_sum_BHT, delta_BHT
    return call(*operands, *starts)


def _grid(x_BTHD: jax.Array) -> dict[str, int]:
    batch, length, heads, _ = x_BTHD.shape
    return {"head": heads, "tile": length // TILE, "batch": batch}


def _rows_of(starts):
    return [plgpu.SMEM((WARPGROUPS, ROWS), x.dtype) for x in starts]


class _Queries(NamedTuple):
    """A warpgroup's, and the keys that its block of threads walks over."""

    b: Any
    h: Any
    heads: int
    warpgroup: Any
    first: Any
    rows: Any  # the slice of positions
    keys: int  # in a step
    columns: Any  # a step's, counted in shared memory
    first_step: Any  # in which any of the block's queries sees a key
    steps: Any
    starts: list[Any]  # where each row's keys start, in shared memory; or nothing
    last_starts: list[Any]  # the last row's

    @classmethod
    def here(cls, q_gmem: Any, columns_smem: Any, start_gmem: Any, start_smem: Any):
        _, length, heads, _ = q_gmem.shape
        b, h, warpgroup = (lax.axis_index(x) for x in ("batch", "head", "warpgroup"))
        tile = length // TILE - 1 - lax.axis_index("tile")
        # The warpgroup that fetches has no queries: it may take the last one's.
        first = tile * TILE + lax.min(warpgroup, WARPGROUPS - 1) * ROWS
        keys = columns_smem.shape[-1]
        first_step = jnp.int32(0)
        for x in start_gmem:
            first_step = lax.div(x[b, tile * TILE], jnp.int32(keys))
        return cls(
            b=b,
            h=h,
            heads=heads,
            warpgroup=warpgroup,
            first=first,
            rows=pl.ds(first, ROWS),
            keys=keys,
            columns=columns_smem.at[warpgroup],
            first_step=first_step,
            steps=(tile + 1) * (TILE // keys) - first_step,
            starts=[x.at[warpgroup] for x in start_smem],
            last_starts=[x[b, first + ROWS - 1] for x in start_gmem],
        )

    def prepare(self, start_gmem: Any, barrier: Any) -> None:
        """Copies what `mask` reads; it is there once the barrier says so."""
        for x, x_smem in zip(start_gmem, self.starts, strict=True):
            plgpu.copy_gmem_to_smem(x.at[self.b, self.rows], x_smem, barrier)
        column_C = lax.broadcasted_iota(jnp.int32, self.columns.shape, 0)
        # Were the layout not given, inferring all others would take forever.
        layout = plgpu.Layout.WGMMA.reduce(0)
        self.columns[...] = plgpu.layout_cast(column_C, layout)

    def mask(self, s_RC: jax.Array, step: Any) -> jax.Array:
        """Returns scores with MASKED where a query doesn't see the key."""
        first_key = (self.first_step + step) * self.keys

        def inside():
            column_RC = lax.broadcast_in_dim(self.columns[...], s_RC.shape, (1,))
            row_RC = lax.broadcasted_iota(jnp.int32, s_RC.shape, 0)
            seen_RC = column_RC <= row_RC + (self.first - first_key)
            for start in self.starts:
                seen_RC &= column_RC >= _across(start[...] - first_key, s_RC)
            return jnp.where(seen_RC, s_RC, MASKED)

        is_cut = first_key + self.keys > self.first
        for last_start in self.last_starts:
            is_cut |= first_key < last_start
        return lax.cond(is_cut, inside, lambda: s_RC)

    def walk(self, step, compute, stages, k_gmem, v_gmem, *, ahead: int = 0) -> None:
        """Loops over keys, which are a step ahead of values, or are not."""

        def of_keys(i):
            return self.first_step + lax.min(i, self.steps - 1), 0

        def of_values(i):
            return self.first_step + lax.max(i - ahead, 0), 0

        pipeline = plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(self.steps + ahead,),
            in_specs=[
                plgpu.BlockSpec((self.keys, k_gmem.shape[-1]), of_keys),
                plgpu.BlockSpec((self.keys, v_gmem.shape[-1]), of_values),
            ],
            max_concurrent_steps=stages,
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            memory_registers=FETCH_REGISTERS,
            compute_context=compute,
        )
        shared = lax.div(self.h, jnp.int32(self.heads // k_gmem.shape[2]))
        pipeline(k_gmem.at[self.b, :, shared], v_gmem.at[self.b, :, shared])


def _forward(scale, q_gmem, k_gmem, v_gmem, *rest):
    starts, rest, start_rows = _split(rest, 6)
    out_gmem, log_sum_gmem, q_smem, log_sum_smem, columns_smem, barrier = rest
    here = _Queries.here(q_gmem, columns_smem, starts, start_rows)
    q_smem, log_sum_smem, barrier = (
        x.at[here.warpgroup] for x in (q_smem, log_sum_smem, barrier)
    )
    by_log2 = scale * math.log2(math.e)

    def step(indices, k_smem, v_smem, carry) -> Any:
        out_RV, top_R, total_R, p_RC = carry

        def softmax(s_RC):
            s_RC = here.mask(s_RC, indices[0])
            new_top_R = jnp.maximum(top_R, by_log2 * s_RC.max(axis=1))
            shrink_R = jnp.exp2(top_R - new_top_R)
            p_RC = jnp.exp2(by_log2 * s_RC - _across(new_top_R, s_RC))
            return new_top_R, total_R * shrink_R + p_RC.sum(axis=1), shrink_R, p_RC

        def both():
            out, (top, total, shrink_R, p) = tensor_cores.products(
                (q_smem, k_smem.T), (p_RC, v_smem, out_RV), softmax
            )
            out *= _across(shrink_R, out)
            return out, top, total, p.astype(v_smem.dtype)

        def last():
            return tensor_cores.product(p_RC, v_smem, out_RV), top_R, total_R, p_RC

        return lax.cond(indices[0] < here.steps, both, last)

    def compute(pipeline):
        plgpu.copy_gmem_to_smem(q_gmem.at[here.b, here.rows, here.h], q_smem, barrier)
        here.prepare(starts, barrier)
        plgpu.barrier_wait(barrier)
        carry = (
            jnp.zeros((ROWS, v_gmem.shape[-1]), jnp.float32),
            jnp.full((ROWS,), LOWEST, jnp.float32),
            jnp.zeros((ROWS,), jnp.float32),
            jnp.zeros((ROWS, KEYS), v_gmem.dtype),
        )
        out_RV, top_R, total_R, _ = pipeline(carry)
        log_sum_smem[...] = top_R * math.log(2) + jnp.log(total_R)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            log_sum_smem, log_sum_gmem.at[here.b, here.h, here.rows]
        )
        out_RV *= _across(1 / total_R, out_RV)
        out_gmem[here.b, here.rows, here.h] = out_RV.astype(out_gmem.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    here.walk(step, compute, STAGES, k_gmem, v_gmem, ahead=1)


def _gradient(
    scale, q_gmem, k_gmem, v_gmem, d_out_gmem, log_sum_gmem, delta_gmem, *rest
):
    starts, (dq_gmem, *rest, columns_smem, barrier), start_rows = _split(rest, 7)
    here = _Queries.here(q_gmem, columns_smem, starts, start_rows)
    b, h, rows = here.b, here.h, here.rows
    q_smem, d_out_smem, log_sum_smem, delta_smem, barrier = (
        x.at[here.warpgroup] for x in (*rest, barrier)
    )

    def compute(pipeline):
        plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem, barrier)
        plgpu.copy_gmem_to_smem(d_out_gmem.at[b, rows, h], d_out_smem, barrier)
        plgpu.copy_gmem_to_smem(log_sum_gmem.at[b, h, rows], log_sum_smem, barrier)
        plgpu.copy_gmem_to_smem(delta_gmem.at[b, h, rows], delta_smem, barrier)
        here.prepare(starts, barrier)
        plgpu.barrier_wait(barrier)
        dq_RQ = pipeline(jnp.zeros(q_smem.shape, jnp.float32))
        q_smem[...] = (scale * dq_RQ).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, dq_gmem.at[b, rows, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def step(indices, k_smem, v_smem, dq_RQ) -> Any:
        s_RC = here.mask(tensor_cores.product(q_smem, k_smem.T), indices[0])
        s_RC = scale * math.log2(math.e) * s_RC - _across(log_sum_smem[...], s_RC)
        p_RC = jnp.exp2(s_RC).astype(k_smem.dtype)
        minus_delta_RC = -_across(delta_smem[...], s_RC)
        ds_RC = tensor_cores.product(d_out_smem, v_smem.T, minus_delta_RC)
        ds_RC = (ds_RC * p_RC.astype(jnp.float32)).astype(k_smem.dtype)
        return tensor_cores.product(ds_RC, k_smem, dq_RQ)

    here.walk(step, compute, GRADIENT_STAGES, k_gmem, v_gmem)


def _split(refs, count):
    """Returns starts in global memory, `count` others, and starts in shared memory."""
    starts = (len(refs) - count) // 2
    return refs[:starts], refs[starts : starts + count], refs[starts + count :]


def _across(x_R: jax.Array, like: jax.Array) -> jax.Array:
    """Returns each row's number, for all columns."""
    return lax.broadcast_in_dim(x_R, like.shape, (0,))
