"""Attention of decoded tokens to a cache of latents (DeepSeek-V2, arXiv 2405.04434).

With the projections of its keys and values absorbed into its queries and outputs
(section 2.1.2), a head's key at a position is what the cache has there, and its value
is the first `value_dim` of that: the latent without the rotated part. So decoding reads
each position once for all heads.

The cache is in pages (`jmoe.ops.paged`).

Shapes: B sequence, Q token of this step, H head, P page, K position in a page, M page
of a sequence, X latent and rotated dimension, C the latent's.
"""

import functools

import jax
import jax.numpy as jnp

from jmoe.ops import paged
from jmoe.ops.by_platform import by_platform

# What the kernel multiplies at a time, and has registers and shared memory for.
KERNEL_DIM, MAX_KERNEL_DIM = 64, 576  # of X
KERNEL_VALUES, MAX_KERNEL_VALUES = 128, 512  # of C
KERNEL_PAGE = 64  # K


def latent_decode(
    q_BQHX: jax.Array,
    pages_PKX: jax.Array,
    sequences: paged.Sequences,
    *,
    value_dim: int,
    scale: float,
) -> jax.Array:
    """Returns each head's mean of cached values, [B, Q, H, value_dim] in q's dtype.

    Of the positions up to the token's own; zeros where there is no token. In bfloat16,
    where the `gpu` extra is installed, it is a kernel when compiled for a Hopper GPU
    (`jmoe.ops.by_platform`). It has no gradient.

    Args:
      value_dim: C.
      scale: multiplies the logits before the float32 softmax.
    """
    sizes = {"value_dim": value_dim, "scale": scale}
    kernel = functools.partial(_kernel, **sizes)
    reference = functools.partial(_reference, **sizes)
    fits = _is_for_kernel(q_BQHX, pages_PKX, value_dim)
    return by_platform(kernel, reference, q_BQHX, pages_PKX, *sequences, fits=fits)


def _is_for_kernel(q_BQHX: jax.Array, pages_PKX: jax.Array, value_dim: int) -> bool:
    size, dim = pages_PKX.shape[1:]
    divides = dim % KERNEL_DIM == 0 and value_dim % KERNEL_VALUES == 0
    has_room = dim <= MAX_KERNEL_DIM and value_dim <= MAX_KERNEL_VALUES
    in_bfloat16 = q_BQHX.dtype == pages_PKX.dtype == jnp.bfloat16
    return divides and has_room and in_bfloat16 and size == KERNEL_PAGE


def _kernel(q_BQHX, pages_PKX, table_BM, position_BQ, *, value_dim, scale):
    """Returns the same, by a kernel to which each token is a sequence of its own."""
    from jmoe.ops.kernels import latent_decode as kernels

    batch, tokens, *dims = q_BQHX.shape
    out = kernels.latent_decode(
        q_BQHX.reshape(-1, *dims),
        pages_PKX,
        jnp.repeat(table_BM, tokens, axis=0),
        position_BQ.reshape(-1) + 1,
        value_dim=value_dim,
        scale=scale,
    )
    return out.reshape(batch, tokens, *out.shape[1:])


def _reference(q_BQHX, pages_PKX, table_BM, position_BQ, *, value_dim, scale):
    def read(page_WJ, is_there_WS):
        entry_W1SX = paged.entries(pages_PKX, page_WJ, is_there_WS)[:, None]
        # As values too, since a part of it would be a copy.
        return entry_W1SX, entry_W1SX

    out_BQHX = paged.attend(
        q_BQHX[:, :, None],
        paged.Sequences(table_BM, position_BQ),
        read,
        page_size=pages_PKX.shape[1],
        value_dim=pages_PKX.shape[2],
        scale=scale,
    )[:, :, 0]
    return out_BQHX[..., :value_dim]
