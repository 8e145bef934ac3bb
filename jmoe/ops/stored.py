"""Weights as they are kept: as arrays, or in fewer bits.

The latter are dequantized where they are used.

A matrix in fewer bits has its input dimension next to last and all outputs in the last.
"""

import jax
import jax.numpy as jnp

from jmoe.ops import dot, fp8, int4

FewerBits = fp8.Quantized | int4.Packed
Weight = jax.Array | FewerBits


def as_array(w: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the array that w stands for."""
    if isinstance(w, fp8.Quantized):
        return fp8.dequantize(w, dtype)
    if isinstance(w, int4.Packed):
        return int4.dequantize(w, dtype)
    return w.astype(dtype)


def as_matrices(w: Weight, dtype: jax.typing.DTypeLike) -> Weight:
    """Returns experts' weights, an array's in `dtype` with outputs in one dimension.

    [E, I, O]; one in fewer bits stays as it is.
    """
    if isinstance(w, FewerBits):
        return w
    # Converted first: one that was only just widened then becomes what it was.
    return w.astype(dtype).reshape(*w.shape[:2], -1)


def like(w: Weight) -> jax.Array:
    """Returns `dot.like` of an array; weights in fewer bits have no gradient."""
    return jnp.zeros(0) if isinstance(w, FewerBits) else dot.like(w)
