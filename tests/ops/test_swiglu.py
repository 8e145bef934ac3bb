"""SwiGLU's product in FP8: what it is, and what is kept of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import fp8, swiglu

RECIPE = fp8.RECIPES["fp8"]
F, N = 150, 40  # of blocks of 128


@pytest.fixture(scope="module")
def arrays():
    """h, its weights, and the output's gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 7, 2, F), (F, N), (2, 7, N)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def product(h, w, precision):
    dot_general = swiglu.after_swiglu(fp8.dot_general(precision))
    return dot_general(h, w, (((h.ndim - 1,), (0,)), ((), ())))


def halves(h):
    return jax.nn.silu(h[..., 0, :]) * h[..., 1, :]


def test_a_native_product_is_that_of_the_gated_half(arrays):
    h, w, _ = arrays
    np.testing.assert_allclose(product(h, w, "native"), halves(h) @ w, rtol=1e-5)


def test_an_fp8_product_is_that_of_the_whole_activations(arrays):
    h, w, _ = arrays
    want = fp8.fp8_dot(halves(h), w, RECIPE)
    np.testing.assert_array_equal(product(h, w, "fp8"), want)


def test_gradients_are_taken_where_the_kept_activations_are(arrays):
    h, w, dy = arrays
    rows = h.reshape(2, 7, -1)
    kept = fp8.dequantize(fp8.quantize(rows, fp8.ROW), jnp.float32).reshape(h.shape)
    _, pull = jax.vjp(lambda h, w: fp8.fp8_dot(halves(h), w, RECIPE), kept, w)
    _, ours = jax.vjp(lambda h, w: product(h, w, "fp8"), h, w)
    for got, want in zip(ours(dy), pull(dy), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_fp8_is_what_is_kept_and_the_output_is_not(arrays):
    h, w, _ = arrays
    _, pull = jax.vjp(lambda h, w: product(h, w, "fp8"), h, w)
    kept = {(x.shape, x.dtype.name) for x in jax.tree.leaves(pull)}
    e4m3 = {((2, 7, 2 * F), "uint8"), ((F, N), "uint8")}  # their bits
    scales = {((2, 7, 3), "float32"), ((2, 1), "float32"), ((0, N), "float32")}
    assert e4m3 <= kept <= e4m3 | scales
