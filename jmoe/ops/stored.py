"""Weights as they are kept: as arrays, or in fewer bits.

The latter are dequantized where they are used.

A matrix in fewer bits has its input dimension next to last and all outputs in the last.
"""

import jax

from jmoe.ops import fp8, int4

FewerBits = fp8.Quantized | int4.Packed
Weight = jax.Array | FewerBits


def as_array(w: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What it stands for."""
    if isinstance(w, fp8.Quantized):
        return fp8.dequantize(w, dtype)
    if isinstance(w, int4.Packed):
        return int4.dequantize(w, dtype)
    return w.astype(dtype)


def as_matrices(w: Weight) -> Weight:
    """Experts' weights, an array's outputs in one dimension: [E, I, O]."""
    return w if isinstance(w, FewerBits) else w.reshape(*w.shape[:2], -1)


def converted(w: Weight, dtype: jax.typing.DTypeLike) -> Weight:
    """An array in another dtype; one in fewer bits stays as it is."""
    return w if isinstance(w, FewerBits) else w.astype(dtype)
