"""Causal attention for Hopper GPUs: `tokamax`'s kernels, and one of our own.

A block of threads takes 64 queries of a head for each of two warpgroups, and walks over
tiles of keys: so do the forward kernel, and the backward one for queries. They could
choose their tiles themselves, but would ask which GPU is there. The gradients of keys
and values need more registers in `tokamax` than there are; ours are `attention_keys`.

Documents of a row are runs of positions. That a query sees only its own is the same as
that it sees no key before its document's first.

Shapes: B batch, T position, H head, Q query/key dimension, V value dimension.
"""
# pyright: reportMissingImports=false

import functools

import jax
import jax.numpy as jnp
from jax import lax
from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as sm90
from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as sm90_vjp

from jmoe.ops.kernels import attention_keys
from jmoe.ops.kernels.fp8_matmul import fill

ROWS = 64  # of a warpgroup, as its tensor cores take them
TILE = 2 * ROWS  # queries
KEYS = 128  # in a step of the forward pass, for which all of shared memory is used
KEYS_OF_DOCUMENTS = 64  # where registers hold the queries' first keys too
COLUMNS = 64  # keys in a step of the backward pass
DIM = 64  # that head dimensions are multiples of, to be multiplied in the backward pass
STAGES = 2  # steps whose operands are in shared memory; as many bytes for any keys


def forward(
    q_BTHQ: jax.Array,
    k_BTHQ: jax.Array,
    v_BTHV: jax.Array,
    segment_BT: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, H, V], and its float32 log-sum-exp [B, H, T].

    Equal segments lie next to each other.
    """
    length = q_BTHQ.shape[1]
    keys = KEYS if segment_BT is None else KEYS_OF_DOCUMENTS
    stages = STAGES * KEYS // keys
    config = sm90.Config(block_q=ROWS, block_kv=keys, num_stages=stages)

    def of_row(start_1T, q_THQ, k_THQ, v_THV):
        return sm90.flash_attention_kernel(
            q_THQ,
            k_THQ,
            v_THV,
            bias=None,
            mask=None,
            k_start=start_1T,
            k_end=None,
            is_causal=True,
            logits_soft_cap=None,
            logits_scale=scale,
            out_dtype=v_THV.dtype,
            normalize_output=True,
            return_residuals=True,
            use_stable_softmax=True,
            rescale_threshold=1.0,
            config=config,
        )

    arrays = (fill(x, 1, TILE, 1, 1) for x in (q_BTHQ, k_BTHQ, v_BTHV))
    out, (top, total) = jax.vmap(of_row)(_starts(segment_BT), *arrays)
    log_sum = top + jnp.log(total)
    return out[:, :length], log_sum[..., :length]


def backward(
    q_BTHQ: jax.Array,
    k_BTHQ: jax.Array,
    v_BTHV: jax.Array,
    segment_BT: jax.Array | None,
    out_BTHV: jax.Array,
    log_sum_BHT: jax.Array,
    d_out_BTHV: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, given what `forward` took and returned."""
    delta_BHT = jnp.einsum(
        "bthv,bthv->bht", out_BTHV, d_out_BTHV, preferred_element_type=jnp.float32
    )
    # A row that fills up has zeros for its output's gradient, and so changes nothing.
    q, k, v, out, d_out = (
        fill(x, 1, TILE, 1, DIM) for x in (q_BTHQ, k_BTHQ, v_BTHV, out_BTHV, d_out_BTHV)
    )
    log_sum, delta = (fill(x, 1, 1, TILE) for x in (log_sum_BHT, delta_BHT))
    start_B1T = _starts(segment_BT)
    dq = jax.vmap(functools.partial(_queries_gradient, scale=scale))(
        start_B1T, log_sum, q, k, v, out, d_out
    )
    start_BT = None if start_B1T is None else start_B1T[:, 0]
    dk, dv = attention_keys.gradients(
        q, k, v, d_out, log_sum, delta, start_BT, scale=scale
    )

    def cut(x, like):
        return x[:, : like.shape[1], :, : like.shape[3]]

    return cut(dq, q_BTHQ), cut(dk, k_BTHQ), cut(dv, v_BTHV)


def _queries_gradient(
    start_1T, log_sum_HT, q_THQ, k_THQ, v_THV, out_THV, d_out_THV, *, scale
):
    dq_THQ, *_ = sm90_vjp.flash_attention_vjp_kernel(
        q_THQ,
        k_THQ,
        v_THV,
        (log_sum_HT, jnp.ones_like(log_sum_HT)),  # the largest logit, and the sum
        out_THV,
        d_out_THV,
        bias=None,
        mask=None,
        k_start=start_1T,
        k_end=None,
        logits_scale=scale,
        logits_soft_cap=None,
        is_causal=True,
        ds_dtype=None,
        config=sm90_vjp.Config(
            block_q_dq=ROWS,
            block_kv_dq=COLUMNS,
            block_q_dkv=ROWS,  # what has these sizes is not used, nor compiled
            block_kv_dkv=ROWS,
            num_stages=STAGES,
        ),
    )
    return dq_THQ


def _starts(segment_BT: jax.Array | None) -> jax.Array | None:
    """Where each position's segment starts, for all heads, [B, 1, T]."""
    if segment_BT is None:
        return None
    segment_BT = fill(segment_BT, 1, TILE)
    position_T = jnp.arange(segment_BT.shape[1], dtype=jnp.int32)
    is_first_BT = segment_BT != jnp.roll(segment_BT, 1, axis=1)
    start_BT = lax.cummax(jnp.where(is_first_BT, position_T, 0), axis=1)
    return start_BT[:, None]
