"""The product after attention in FP8: what it is, and what is kept of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import blocks, dot, fp8
from jmoe.ops.after_attention import after_attention
from tests.ops.format_tables import e5m6_of_blocks

M, K, N = 14, 150, 40  # of blocks of 128
CONTRACT = (((2,), (0,)), ((), ()))


@pytest.fixture(scope="module")
def arrays():
    """x, of different sizes from channel to channel, w, and the output's gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (2, 7, K), (K, N), (2, 7, N)
    x, w, dy = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False))
    return x * jnp.exp(2 * jax.random.normal(keys[3], (K,))), w, dy


def product(x, w, recipe="fp8"):
    return after_attention(fp8.dot_general(recipe))(x, w, CONTRACT)


def wide(x, block, power_of_two=False):
    """What e4m3 leaves of a matrix, in float64."""
    left = fp8.rounded(jnp.asarray(x), block, power_of_two=power_of_two)
    return np.asarray(left, np.float64)


def test_a_native_product_is_that_of_the_other_layers():
    assert after_attention(dot.dot_general) is dot.dot_general
    assert after_attention(jax.lax.dot_general) is jax.lax.dot_general


@pytest.mark.parametrize("recipe", ["fp8", "fp8_tensor"])
def test_the_output_is_of_e4m3_with_powers_of_two_for_the_inputs_scales(arrays, recipe):
    x, w, _ = arrays
    how = fp8.RECIPES[recipe]
    x_MK = wide(x.reshape(M, K), how.activations, power_of_two=True)
    want = x_MK @ wide(w, how.weights)
    np.testing.assert_allclose(
        product(x, w, recipe).reshape(M, N), want, atol=1e-5 * np.abs(want).max()
    )


def test_gradients_are_of_e5m6_turned_into_columns_of_e4m3(arrays):
    x, w, dy = arrays
    _, pull = jax.vjp(product, x, w)
    dx, dw = pull(dy)
    dy_MN = dy.reshape(M, N)
    want = wide(dy_MN, fp8.ROW) @ wide(w, fp8.SQUARE).T
    off = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(dx.reshape(M, K), want, atol=off)

    kept = e5m6_of_blocks(np.float64(x.reshape(M, K)), (1, blocks.BLOCK))
    column = blocks.transposed(fp8.ROW)
    x_MK = wide(np.float32(kept), column, power_of_two=True)
    want = x_MK.T @ wide(dy_MN, column)
    np.testing.assert_allclose(dw, want, atol=1e-5 * np.abs(want).max())


def test_the_weights_gradient_is_closer_than_from_e4m3_that_was_rounded_twice(arrays):
    x, w, dy = arrays
    want = np.einsum("btk,btn->kn", np.float64(x), np.float64(dy))

    def error(product):
        _, pull = jax.vjp(product, x, w)
        return np.linalg.norm((pull(dy)[1] - want) / np.abs(want).max(1, keepdims=True))

    others = error(lambda x, w: fp8.fp8_dot(x, w, fp8.RECIPES["fp8"]))
    assert error(product) < 0.9 * others


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_e5m6_is_what_is_kept_as_bfloat16_and_nothing_else(arrays, dtype):
    x, w, _ = (a.astype(dtype) for a in arrays)
    y, pull = jax.vjp(product, x, w)
    assert y.dtype == dtype
    kept = {(a.shape, a.dtype.name): a for a in jax.tree.leaves(pull) if a.size}
    scales = {((2, 1), "float32")}
    data = {((M, K), "bfloat16"), ((K, N), "uint8")}
    assert data <= kept.keys() <= data | scales
    want = e5m6_of_blocks(np.float64(x.reshape(M, K)), (1, blocks.BLOCK))
    np.testing.assert_array_equal(np.float64(kept[(M, K), "bfloat16"]), want)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_token_and_the_weights_gradient(arrays, bad):
    x, w, dy = arrays
    y, pull = jax.vjp(product, x.at[1, 2, 3].set(bad), w)
    _, dw = pull(dy)
    is_spoiled = jnp.zeros((2, 7), bool).at[1, 2].set(True)
    np.testing.assert_array_equal(jnp.isnan(y).all(-1), is_spoiled)
    np.testing.assert_array_equal(jnp.isnan(y).any(-1), is_spoiled)
    assert jnp.isnan(dw[:128]).all() and jnp.isfinite(dw[128:]).all()
