"""SwiGLU (Shazeer, arXiv 2002.05202), and its product with the weights that follow.

Shapes: F MLP dimension, X = 2 F the gate and up halves, N output.

In FP8, what a layer keeps for its backward pass is not SwiGLU's output but its input,
quantized, from which the output is computed again (DeepSeek-V3, arXiv 2412.19437,
section 3.3.3).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.ops import fp8


def swiglu(h: jax.Array) -> jax.Array:
    """Returns `silu(gate) * up`, [..., F] of [..., X]."""
    return _gated(*jnp.split(h, 2, axis=-1))


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def after_swiglu(dot_general: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a linear layer's `dot_general` of h [..., 2, F]: of SwiGLU of h."""
    recipe = fp8.recipe_of(dot_general)

    def product(h: jax.Array, w_FN: jax.Array, dimension_numbers: Any) -> jax.Array:
        del dimension_numbers  # are those of h, which has one more
        if recipe is not None:
            return fp8_swiglu_dot(h.reshape(*h.shape[:-2], -1), w_FN, recipe)
        act = _gated(h[..., 0, :], h[..., 1, :])
        return dot_general(act, w_FN, (((act.ndim - 1,), (0,)), ((), ())))

    return product


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fp8_swiglu_dot(h: jax.Array, w_FN: jax.Array, recipe: fp8.Recipe) -> jax.Array:
    """Returns `fp8.fp8_dot(swiglu(h), w)`, [..., N] of h [..., X]; keeps h in FP8."""
    return _forward(h, w_FN, recipe)[0]


def _forward(h: jax.Array, w_FN: jax.Array, recipe: fp8.Recipe):
    kept = fp8.to_bits(recipe.quantize(h, fp8.ROW))
    y, (_, *of_weights) = fp8.forward(swiglu(h), w_FN, recipe)
    return y, (kept, *of_weights)


def _backward(recipe: fp8.Recipe, saved: Any, dy: jax.Array):
    kept, *of_weights = saved
    act, pull = jax.vjp(swiglu, fp8.dequantize(fp8.from_bits(kept), dy.dtype))
    act_MF = recipe.quantize(act.reshape(-1, act.shape[-1]), recipe.activations)
    d_act, d_w = fp8.backward(recipe, (fp8.to_bits(act_MF), *of_weights), dy)
    return *pull(d_act), d_w


fp8_swiglu_dot.defvjp(_forward, _backward)
