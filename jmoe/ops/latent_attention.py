"""Attention of decoded tokens to a cache of latents (DeepSeek-V2, arXiv 2405.04434).

With the projections of its keys and values absorbed into its queries and outputs
(section 2.1.2), a head's key at a position is what the cache has there, and its value
is the first `value_dim` of that: the latent without the rotated part. So decoding reads
each position once for all heads.

The softmax is computed a block of positions at a time, as in `jmoe.ops.attention`.

Shapes: B sequence, H head, S position of the cache, X latent and rotated dimension, C
the latent's, K position of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.attention import MASKED
from jmoe.ops.by_platform import by_platform

BLOCK = 512  # positions scored at a time

# What the kernel multiplies at a time, and has registers and shared memory for.
KERNEL_DIM, MAX_KERNEL_DIM = 64, 576  # of X
KERNEL_VALUES, MAX_KERNEL_VALUES = 128, 512  # of C


def latent_decode(
    q_BHX: jax.Array,
    cache_BSX: jax.Array,
    length_B: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> jax.Array:
    """Returns each head's mean of the cache's values, [B, H, value_dim] in q's dtype.

    In bfloat16, where the `gpu` extra is installed, it is a kernel when compiled for a
    Hopper GPU (`jmoe.ops.by_platform`). It has no gradient.

    Args:
      length_B: int32, at most S: how many positions of the cache are there; others
        have anything finite. Of none, the result is zero.
      value_dim: C.
      scale: multiplies the logits before the float32 softmax.
    """

    def kernel(*operands):
        from jmoe.ops.kernels import latent_decode as kernels

        return kernels.latent_decode(*operands, value_dim=value_dim, scale=scale)

    reference = functools.partial(_reference, value_dim=value_dim, scale=scale)
    fits = _is_for_kernel(q_BHX, cache_BSX, value_dim)
    operands = q_BHX, cache_BSX, length_B
    return by_platform(kernel, reference, *operands, fits=fits)


def _is_for_kernel(q_BHX: jax.Array, cache_BSX: jax.Array, value_dim: int) -> bool:
    dim = cache_BSX.shape[-1]
    divides = dim % KERNEL_DIM == 0 and value_dim % KERNEL_VALUES == 0
    has_room = dim <= MAX_KERNEL_DIM and value_dim <= MAX_KERNEL_VALUES
    return divides and has_room and q_BHX.dtype == cache_BSX.dtype == jnp.bfloat16


def _reference(
    q_BHX: jax.Array,
    cache_BSX: jax.Array,
    length_B: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> jax.Array:
    positions = cache_BSX.shape[1]
    size = min(BLOCK, positions)

    def visit(i, carry):
        out_BHC, top_BH, total_BH = carry
        # The last block starts early enough to be whole; what it repeats is masked.
        start = jnp.minimum(i * size, positions - size)
        cache_BKX = lax.dynamic_slice_in_dim(cache_BSX, start, size, axis=1)
        logits_BHK = scale * jnp.einsum(
            "bhx,bkx->bhk", q_BHX, cache_BKX, preferred_element_type=jnp.float32
        )
        position_K = start + jnp.arange(size)
        is_new_BK = (position_K >= i * size) & (position_K < length_B[:, None])
        logits_BHK = jnp.where(is_new_BK[:, None], logits_BHK, MASKED)
        new_top_BH = jnp.maximum(top_BH, logits_BHK.max(-1))
        weight_BHK = jnp.exp(logits_BHK - new_top_BH[..., None]) * is_new_BK[:, None]
        shrink_BH = jnp.exp(top_BH - new_top_BH)
        value_BHC = jnp.einsum(
            "bhk,bkc->bhc",
            weight_BHK.astype(cache_BKX.dtype),
            cache_BKX[..., :value_dim],
            preferred_element_type=jnp.float32,
        )
        out_BHC = out_BHC * shrink_BH[..., None] + value_BHC
        return out_BHC, new_top_BH, total_BH * shrink_BH + weight_BHK.sum(-1)

    rows = q_BHX.shape[:2]
    start = (
        jnp.zeros((*rows, value_dim), jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    # As many blocks as the longest sequence has.
    count = -(-length_B.max() // size)
    out_BHC, _, total_BH = lax.fori_loop(0, count, visit, start)
    total_BH = jnp.where(total_BH > 0, total_BH, 1.0)
    return (out_BHC / total_BH[..., None]).astype(q_BHX.dtype)
