"""The product of attention's outputs with the weights that follow, in FP8.

As DeepSeek-V3 has it (arXiv 2412.19437, section 3.3.3), which found this place to need
more precision than others: attention's own backward pass has these numbers too. Their
scales are powers of two, in all three products, and what is kept of them for the
gradient of the weights is e5m6, in blocks of rows; for that product, it is quantized in
blocks of columns. Rounding twice costs less than from e4m3 to e4m3: e5m6 has three
more bits, and powers of two move no bits of its numbers.

e5m6 times its scales is kept as bfloat16, which has all such numbers: 2 bytes of each,
where the other linear layers keep 1. Attention keeps its output in the model's dtype
besides.

Dimensions: M row, K of all heads' values, N output.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.ops import blocks, fp8
from jmoe.ops.formats import E5M6


def after_attention(dot_general: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a `dot_general` of the linear layer after attention, from the others'."""
    recipe = fp8.recipe_of(dot_general)
    if recipe is None:
        return dot_general

    def product(x: jax.Array, w_KN: jax.Array, dimension_numbers: Any) -> jax.Array:
        del dimension_numbers  # are a linear layer's
        return fp8_attention_dot(x, w_KN, recipe)

    return product


@functools.partial(jax.jit, static_argnames="block")
def kept_in_e5m6(x_MK: jax.Array, block: blocks.Block) -> jax.Array:
    """Returns what e5m6 leaves of x, with powers of two for scales: bfloat16."""
    kept_MK = blocks.rounded(x_MK, block, E5M6, power_of_two=True)
    return kept_MK.astype(jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fp8_attention_dot(x: jax.Array, w_KN: jax.Array, recipe: fp8.Recipe) -> jax.Array:
    """Returns `x @ w`, [..., N] of x [..., K], in x's dtype, and keeps x in e5m6."""
    return _forward(x, w_KN, recipe)[0]


def _forward(x: jax.Array, w_KN: jax.Array, recipe: fp8.Recipe):
    x_MK = x.reshape(-1, x.shape[-1])
    quantized = fp8.quantize(x_MK, recipe.activations, power_of_two=True)
    y_MN, of_weights = fp8.multiply(quantized, w_KN, recipe, x.dtype)
    kept = kept_in_e5m6(x_MK, recipe.activations)
    return y_MN.reshape(*x.shape[:-1], w_KN.shape[1]), (kept, of_weights)


def _backward(recipe: fp8.Recipe, saved: Any, dy: jax.Array):
    kept_MK, of_weights = saved
    along = blocks.transposed(recipe.activations)
    x_MK = fp8.quantize(kept_MK, along, power_of_two=True)
    return fp8.gradients(recipe, x_MK, of_weights, dy)


fp8_attention_dot.defvjp(_forward, _backward)
