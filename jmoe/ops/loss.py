"""Cross-entropy of a linear head, a chunk of tokens at a time.

Shapes: N token, C chunk, D hidden, V vocabulary.

With V3's vocabulary the logits of one 4K sequence are 2 GB, so they never exist at
once: the forward pass takes a chunk's logits, its loss *and* its gradients with respect
to hidden state and head, and drops the logits. The backward pass only scales those
gradients. That is three matmuls, as many as with all logits kept, and one more
than the loss alone, which is why the undifferentiated call takes another path.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(
    x_ND: jax.Array,
    head_DV: jax.Array,
    target_N: jax.Array,
    weight_N: jax.Array,
    chunk: int,
) -> jax.Array:
    """Float32 sum over tokens of `weight * -log softmax(x @ head)[target]`, in nats.

    Args:
      target_N: int32 token to predict.
      weight_N: float32; 0 leaves a token out. No gradient flows to it.
      chunk: tokens whose logits exist at one time; any size, N need not divide.
    """

    def visit(total, rows):
        x_CD, target_C, weight_C = rows
        loss_C, *_ = _token_losses(x_CD, head_DV, target_C)
        return total + (weight_C * loss_C).sum(), None

    rows = _chunks(chunk, x_ND, target_N, weight_N)
    return jax.lax.scan(visit, jnp.float32(0.0), rows)[0]


def _token_losses(x_CD, head_DV, target_C):
    logits_CV = jnp.dot(x_CD, head_DV, preferred_element_type=jnp.float32)
    log_sum_C = jax.nn.logsumexp(logits_CV, axis=-1)
    picked_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]
    return log_sum_C - picked_C, logits_CV, log_sum_C


def _chunks(chunk, *arrays):
    """Each array as [chunks, chunk, ...], the last one filled with zeros."""
    count = -(-arrays[0].shape[0] // chunk)

    def cut(x):
        missing = count * chunk - x.shape[0]
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, chunk, *x.shape[1:])

    return tuple(map(cut, arrays))


def _forward(x_ND, head_DV, target_N, weight_N, chunk):
    vocab = jnp.arange(head_DV.shape[1])

    def visit(carry, rows):
        total, d_head_DV = carry
        x_CD, target_C, weight_C = rows
        loss_C, logits_CV, log_sum_C = _token_losses(x_CD, head_DV, target_C)
        d_logits_CV = jnp.exp(logits_CV - log_sum_C[:, None])
        d_logits_CV -= (vocab == target_C[:, None]).astype(jnp.float32)
        d_logits_CV = (d_logits_CV * weight_C[:, None]).astype(x_CD.dtype)
        d_x_CD = jnp.dot(d_logits_CV, head_DV.T)
        d_head_DV += jnp.dot(x_CD.T, d_logits_CV, preferred_element_type=jnp.float32)
        return (total + (weight_C * loss_C).sum(), d_head_DV), d_x_CD

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
