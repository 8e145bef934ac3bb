"""RMSNorm against its formula."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.ops import norm

EPSILON = 1e-6


def formula(x, scale_D, epsilon=EPSILON):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale_D


def test_every_row_is_divided_by_its_root_mean_square_and_scaled():
    rng = np.random.default_rng(0)
    x_BTD = (rng.normal(size=(2, 3, 16)) * [[[1e-3], [1], [1e3]]]).astype(np.float32)
    scale_D = rng.normal(size=16).astype(np.float32)
    got = norm.rms_norm(x_BTD, scale_D, EPSILON)
    np.testing.assert_allclose(got, formula(x_BTD, scale_D), rtol=1e-5)


def test_a_row_of_zeros_stays_zero_and_epsilon_bounds_its_gradient():
    def total(x_D):
        return norm.rms_norm(x_D, jnp.full(8, 3.0), EPSILON).sum()

    value, gradient_D = jax.value_and_grad(total)(jnp.zeros(8))
    assert value == 0
    np.testing.assert_allclose(gradient_D, 3 / EPSILON**0.5, rtol=1e-5)


def test_bfloat16_rows_lose_only_the_rounding_of_the_result():
    # A bfloat16 sum of 4096 squares would stop growing near 256.
    x_TD = np.random.default_rng(0).normal(size=(4, 4096))
    x_TD = jnp.asarray(x_TD, jnp.bfloat16)
    got = norm.rms_norm(x_TD, jnp.ones(4096), EPSILON)
    assert got.dtype == jnp.bfloat16
    want = formula(x_TD, 1.0)
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=2**-8)
