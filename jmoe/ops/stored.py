"""Weights as they are kept: as arrays, or in fewer bits.

The latter are dequantized where they are used.

A matrix in fewer bits has its input dimension next to last and all outputs in the last.

Experts' weights may come in *parts*, arrays of some experts each: those that a device
holds and those that it has borrowed. They are joined where they are multiplied by, so
that what is kept for a backward pass is the parts, and no copy of them.
"""

import itertools

import jax
import jax.numpy as jnp

from jmoe.ops import dot, fp8, int4

FewerBits = fp8.Quantized | int4.Packed
Weight = jax.Array | FewerBits
Weights = Weight | list[jax.Array]
"""Experts' weights; a list is of parts."""


def as_array(w: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the array that w stands for."""
    if isinstance(w, fp8.Quantized):
        return fp8.dequantize(w, dtype)
    if isinstance(w, int4.Packed):
        return int4.dequantize(w, dtype)
    return w.astype(dtype)


def as_matrices(w: Weights, dtype: jax.typing.DTypeLike) -> Weights:
    """Returns experts' weights, an array's in `dtype` with outputs in one dimension.

    [E, I, O]; parts are parts still, and one in fewer bits stays as it is.
    """
    if isinstance(w, FewerBits):
        return w
    if isinstance(w, list):
        return [as_matrices(part, dtype) for part in w]
    # Converted first: one that was only just widened then becomes what it was.
    return w.astype(dtype).reshape(*w.shape[:2], -1)


def joined(w: Weights) -> Weight:
    """Returns the weights of all experts as one, the parts' one after the other."""
    return jnp.concatenate(w) if isinstance(w, list) else w


def like(w: Weights) -> jax.Array | list[jax.Array]:
    """Returns `dot.like` of an array; weights in fewer bits have no gradient.

    Of parts, `dot.like` of each.
    """
    if isinstance(w, FewerBits):
        return jnp.zeros(0)
    return [dot.like(part) for part in w] if isinstance(w, list) else dot.like(w)


def gradient(
    d_w: jax.Array, w: Weights, like: jax.Array | list[jax.Array]
) -> jax.Array | list[jax.Array]:
    """Returns the gradient of all experts' weights in parts as w's, each like `like`."""
    if not isinstance(w, list):
        return d_w.astype(like.dtype)
    ends = itertools.accumulate(len(part) for part in w)
    cuts = [d_w[end - len(part) : end] for part, end in zip(w, ends, strict=True)]
    return [x.astype(of.dtype) for x, of in zip(cuts, like, strict=True)]
