"""The gradients of attention's keys and values, as a kernel for Hopper GPUs.

A warpgroup has ROWS keys of a head, and walks over the queries that see them, of all
heads that share it,

    p = exp(scale q k - log_sum)         dv += p^T d_out
    ds = p (d_out v - delta)             dk += scale ds^T q

as the transposes, so that what comes out of one product goes into the next from
registers. Of a thread's 240, for queries and values of 192 and 128, the sums take 160
and a product 32. Hence p is kept in bfloat16 only; the product with v starts from
-delta; one product is done before the next begins, while the other warpgroup's keep the
tensor cores busy; and queries' positions are read, for if they were computed, the
compiler would do so before the loop and keep them.

Shapes: B batch, T position, H head, K head of keys and values, each of which equally
many heads share, Q query/key dimension, V value dimension; within a kernel, R key (a
warpgroup's row) and C query (a column).
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
from jmoe.ops.kernels.launch import WARPGROUPS, launcher

ROWS = 64
COLUMNS = 64
STAGES = 2  # steps whose operands are in shared memory
TILE = WARPGROUPS * ROWS
FETCH_REGISTERS = 24  # of a thread that fetches; those that multiply share the rest


@functools.partial(jax.jit, static_argnames="scale")
def gradients(
    q_BTHQ: jax.Array,
    k_BTKQ: jax.Array,
    v_BTKV: jax.Array,
    d_out_BTHV: jax.Array,
    log_sum_BHT: jax.Array,
    delta_BHT: jax.Array,
    start_BT: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the keys and of the values, in their dtype.

    T is a multiple of TILE, Q and V are of 64.

    Args:
      log_sum_BHT: float32, of the exponentials of a query's scaled logits.
      delta_BHT: float32, the output times its gradient, summed over V.
      start_BT: int32; a query sees no key before it. None: all earlier ones.
    """
    batch, length, heads, qk_dim = k_BTKQ.shape
    grid = {"head": heads, "tile": length // TILE, "batch": batch}
    call = launcher(
        functools.partial(_kernel, scale),
        "attention_keys",
        (k_BTKQ, v_BTKV),
        [
            plgpu.SMEM((WARPGROUPS, ROWS, qk_dim), k_BTKQ.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS, v_BTKV.shape[-1]), v_BTKV.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
        ],
        grid,
        approx_math=True,
    )
    position_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    ranges = [position_BT] if start_BT is None else [position_BT, start_BT]
    log_sum_BHT *= math.log2(math.e)
    # All heads in one dimension, of which a step takes a head's part.
    of_queries = [x.reshape(batch, length, -1) for x in (q_BTHQ, d_out_BTHV)]
    sums = [x.reshape(batch, -1) for x in (log_sum_BHT, delta_BHT)]
    return call(k_BTKQ, v_BTKV, *of_queries, *sums, *ranges)


def _kernel(scale, k_gmem, v_gmem, q_gmem, d_out_gmem, log_sum_gmem, delta_gmem, *rest):
    *ranges, dk_gmem, dv_gmem, k_smem, v_smem, barrier = rest
    b, h, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    warpgroup = lax.axis_index("warpgroup")
    k_smem, v_smem = k_smem.at[warpgroup], v_smem.at[warpgroup]
    barrier = barrier.at[warpgroup]
    first_key = tile * TILE + warpgroup * ROWS
    keys = pl.ds(first_key, ROWS)
    skipped = tile * (TILE // COLUMNS)  # queries before all of the tile's keys
    columns = q_gmem.shape[1] // COLUMNS
    group = q_gmem.shape[-1] // (k_gmem.shape[2] * k_gmem.shape[-1])

    def step(indices, q_smem, d_out_smem, log_sum_smem, delta_smem, *rest) -> Any:
        *ranges, (dk_RQ, dv_RV) = rest
        s_RC = scale * math.log2(math.e) * tensor_cores.product(k_smem, q_smem.T)
        p_RC = jnp.exp2(s_RC - _columns(log_sum_smem))
        first_query = (skipped + indices[1]) * COLUMNS
        p_RC = _mask(p_RC, first_key, first_query, *ranges).astype(v_smem.dtype)
        dv_RV = tensor_cores.product(p_RC, d_out_smem, dv_RV)
        ds_RC = tensor_cores.product(v_smem, d_out_smem.T, -_columns(delta_smem))
        ds_RC *= p_RC.astype(jnp.float32)
        return tensor_cores.product(ds_RC.astype(k_smem.dtype), q_smem, dk_RQ), dv_RV

    def compute(pipeline):
        plgpu.copy_gmem_to_smem(k_gmem.at[b, keys, h], k_smem, barrier)
        plgpu.copy_gmem_to_smem(v_gmem.at[b, keys, h], v_smem, barrier)
        plgpu.barrier_wait(barrier)
        nothing = (jnp.zeros(x.shape, jnp.float32) for x in (k_smem, v_smem))
        dk_RQ, dv_RV = pipeline(tuple(nothing))
        k_smem[...] = (scale * dk_RQ).astype(k_smem.dtype)
        v_smem[...] = dv_RV.astype(v_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem, dk_gmem.at[b, keys, h])
        plgpu.copy_smem_to_gmem(v_smem, dv_gmem.at[b, keys, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def of_queries(dim):
        return plgpu.BlockSpec(
            (COLUMNS, dim), lambda g, i: (skipped + i, h * group + g)
        )

    def of_head(g, i):
        return ((h * group + g) * columns + skipped + i,)

    def of_all(g, i):
        del g
        return (skipped + i,)

    pipeline = plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(group, columns - skipped),
        in_specs=[of_queries(k_smem.shape[-1]), of_queries(v_smem.shape[-1])]
        + [plgpu.BlockSpec((COLUMNS,), of_head)] * 2
        + [plgpu.BlockSpec((COLUMNS,), of_all)] * len(ranges),
        max_concurrent_steps=STAGES,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        memory_registers=FETCH_REGISTERS,
        compute_context=compute,
    )
    operands = q_gmem, d_out_gmem, log_sum_gmem, delta_gmem, *ranges
    pipeline(*(x.at[b] for x in operands))


def _columns(x_smem: Any) -> jax.Array:
    """Returns each query's number, for all keys."""
    return lax.broadcast_in_dim(x_smem[...], (ROWS, COLUMNS), (1,))


def _mask(p_RC: jax.Array, first_key: Any, first_query: Any, query: Any, *start: Any):
    """Returns probabilities with zeros where a query doesn't see the key."""
    key_RC = first_key + lax.broadcasted_iota(jnp.int32, p_RC.shape, 0)

    def earlier():
        return jnp.where(_columns(query) >= key_RC, p_RC, 0.0)

    p_RC = lax.cond(first_query < first_key + ROWS, earlier, lambda: p_RC)
    for first in start:
        p_RC = jnp.where(key_RC >= _columns(first), p_RC, 0.0)
    return p_RC
