"""Embedding and cross-entropy of a vocabulary that is divided over `tensor`.

Shapes: B sequence, T position, S this device's positions, N token (this device's), C
chunk, R row (a chunk of each device of the tensor group), D hidden, V vocabulary (this
device's part). On one device, S = T, R = C and V is all.

With V3's vocabulary the logits of one 4K sequence are 2 GB, so they never exist at
once, and are never gathered: the forward pass takes a chunk's logits, its loss *and*
its gradients with respect to hidden state and head, and drops the logits. The backward
pass only scales those gradients. That is three matmuls, as many as with all logits
kept, and one more than the loss alone, which is why the undifferentiated call takes
another path. Over `tensor` travel a chunk's hidden states, two numbers for a row, and
the sum of the hidden states' gradients.

A token that occurs thousands of times adds up as many gradients in its row, and so does
a frequent target in its column. Both are summed in float32, and it is the sum that is
rounded, to the dtype that the table or the head is held in.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.ops import dot
from jmoe.parallel import collectives

AXIS = "tensor"


def embed(
    table_VD: jax.Array, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns all tokens' rows, of which this device gets its positions, [B, S, D].

    In `dtype`. The table's gradient has the table's.
    """
    local_BT, here_BT = _own(tokens_BT, table_VD.shape[0])
    rows_BTD: jax.Array = _rows(table_VD, local_BT, jnp.dtype(dtype))
    if collectives.axis_size(AXIS) == 1:
        return rows_BTD
    # Of a token's row, other devices have zeros: no sum rounds it.
    rows_BTD = jnp.where(here_BT[..., None], rows_BTD, 0)
    return collectives.reduce_scatter(rows_BTD, AXIS, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(table_VD: jax.Array, index_BT: jax.Array, dtype: Any) -> jax.Array:
    """Returns the table's rows, converted; each row's gradient is summed in float32."""
    return table_VD[index_BT].astype(dtype)


def _rows_forward(table_VD, index_BT, dtype):
    like_V0 = jnp.zeros((table_VD.shape[0], 0), table_VD.dtype)
    return _rows(table_VD, index_BT, dtype), (index_BT, like_V0)


def _rows_backward(dtype, saved, d_rows_BTD):
    index_BT, like_V0 = saved
    shape = like_V0.shape[0], d_rows_BTD.shape[-1]
    d_table_VD = jnp.zeros(shape, jnp.float32)
    d_table_VD = d_table_VD.at[index_BT].add(d_rows_BTD.astype(jnp.float32))
    return d_table_VD.astype(like_V0.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def next_logits(
    hidden_BSD: jax.Array, head_DV: jax.Array, last_B: jax.Array
) -> jax.Array:
    """Returns float32 logits [B, V] of what follows position `last_B`, of all of V.

    The same on each device of the tensor group. Its all-reduce is of [B, D] hidden
    states, its all-gather of the logits.
    """
    size = hidden_BSD.shape[1]
    local_B = last_B - collectives.axis_index(AXIS) * size
    here_B = (local_B >= 0) & (local_B < size)
    rows_B = jnp.arange(len(last_B))
    last_BD = hidden_BSD[rows_B, jnp.where(here_B, local_B, 0)]
    last_BD = collectives.psum(jnp.where(here_B[:, None], last_BD, 0), AXIS)
    rounded_DV = head_DV.astype(last_BD.dtype)
    logits_BV = jnp.dot(last_BD, rounded_DV, preferred_element_type=jnp.float32)
    return collectives.all_gather(logits_BV, AXIS, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(
    x_ND: jax.Array,
    head_DV: jax.Array,
    target_N: jax.Array,
    weight_N: jax.Array,
    chunk: int,
) -> jax.Array:
    """Returns the float32 sum of `weight * -log softmax(x @ head)[target]`, in nats.

    Over the tokens of the whole tensor group, and the same on each of its devices. The
    head is converted to x's dtype; its gradient has its own.

    Args:
      target_N: int32 token to predict.
      weight_N: float32; 0 leaves a token out. No gradient flows to it.
      chunk: tokens whose logits a device has at one time, as if it had all of V; any
        size, N need not divide.
    """

    def visit(total, rows):
        x_RD, target_R, weight_R = _of_group(rows)
        loss_R, *_ = _token_losses(x_RD, rounded_DV, target_R)
        return total + (weight_R * loss_R).sum(), None

    rounded_DV = head_DV.astype(x_ND.dtype)
    rows = _chunks(chunk, x_ND, target_N, weight_N)
    return jax.lax.scan(visit, jnp.float32(0.0), rows)[0]


def _own(tokens: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns tokens as indices into this device's part of V, and which are in it."""
    local = tokens - collectives.axis_index(AXIS) * size
    here = (local >= 0) & (local < size)
    return jnp.where(here, local, 0), here


def _of_group(rows):
    return tuple(collectives.all_gather(x, AXIS, 0) for x in rows)


def _token_losses(x_RD, head_DV, target_R):
    logits_RV = jnp.dot(x_RD, head_DV, preferred_element_type=jnp.float32)
    local_R, here_R = _own(target_R, head_DV.shape[1])
    picked_R = jnp.take_along_axis(logits_RV, local_R[:, None], axis=-1)[:, 0]
    picked_R = collectives.psum(jnp.where(here_R, picked_R, 0), AXIS)
    top_R = collectives.pmax(logits_RV.max(-1), AXIS)
    sum_R = collectives.psum(jnp.exp(logits_RV - top_R[:, None]).sum(-1), AXIS)
    log_sum_R = top_R + jnp.log(sum_R)
    return log_sum_R - picked_R, logits_RV, log_sum_R


def _chunks(chunk, *arrays):
    """Returns each array as [chunks, chunk, ...], the last one filled with zeros."""
    chunk = min(chunk, arrays[0].shape[0])
    count = -(-arrays[0].shape[0] // chunk)

    def cut(x):
        missing = count * chunk - x.shape[0]
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, chunk, *x.shape[1:])

    return tuple(map(cut, arrays))


def _forward(x_ND, head_DV, target_N, weight_N, chunk):
    vocab = jnp.arange(head_DV.shape[1])
    rounded_DV = head_DV.astype(x_ND.dtype)

    def visit(carry, rows):
        total, d_head_DV = carry
        x_RD, target_R, weight_R = _of_group(rows)
        loss_R, logits_RV, log_sum_R = _token_losses(x_RD, rounded_DV, target_R)
        local_R, here_R = _own(target_R, head_DV.shape[1])
        is_target_RV = (vocab == local_R[:, None]) & here_R[:, None]
        d_logits_RV = jnp.exp(logits_RV - log_sum_R[:, None])
        d_logits_RV -= is_target_RV.astype(jnp.float32)
        d_logits_RV = (d_logits_RV * weight_R[:, None]).astype(x_RD.dtype)
        d_x_RD = jnp.dot(d_logits_RV, rounded_DV.T)
        d_head_DV += dot.outer(x_RD, d_logits_RV, preferred_element_type=jnp.float32)
        d_x_CD = collectives.reduce_scatter(d_x_RD, AXIS, 0)
        return (total + (weight_R * loss_R).sum(), d_head_DV), d_x_CD

    start = (jnp.float32(0.0), jnp.zeros(head_DV.shape, jnp.float32))
    (total, d_head_DV), d_x = jax.lax.scan(
        visit, start, _chunks(chunk, x_ND, target_N, weight_N)
    )
    d_x_ND = d_x.reshape(-1, x_ND.shape[1])[: x_ND.shape[0]]
    return total, (d_x_ND, d_head_DV.astype(head_DV.dtype))


def _backward(chunk, saved, d_total):
    d_x_ND, d_head_DV = saved
    return (
        (d_x_ND * d_total).astype(d_x_ND.dtype),
        (d_head_DV * d_total).astype(d_head_DV.dtype),
        None,
        None,
    )


linear_cross_entropy.defvjp(_forward, _backward)
