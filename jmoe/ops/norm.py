"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """Returns `x / sqrt(mean(x^2) + epsilon) * scale` over the last dimension.

    The mean runs in float32; the result has x's dtype.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale_D).astype(x.dtype)
