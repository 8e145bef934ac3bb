"""Newton-Schulz against singular values; tests/train have it against optax's."""

import jax
import numpy as np
import pytest

from jmoe.ops.newton_schulz import COEFFICIENTS, newton_schulz

# A shape each: wide, tall and square; a batch of three.
each_shape = pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (3, 24, 24)])


def draw(shape) -> np.ndarray:
    """Singular values between a tenth and one, as a random square's are not."""
    x = np.random.default_rng(0).normal(size=shape)
    left, value, right = np.linalg.svd(x, full_matrices=False)
    value = np.linspace(1, 0.1, value.shape[-1])
    return (left * value @ right).astype(np.float32)


@each_shape
def test_singular_values_come_near_one_whatever_the_matrix_is_scaled_by(shape):
    for scale in (1e-6, 1.0, 1e6):
        got = jax.jit(newton_schulz)(scale * draw(shape))
        singular = np.linalg.svd(got, compute_uv=False)
        assert 0.6 < singular.min() and singular.max() < 1.3, scale


@each_shape
def test_singular_vectors_stay_and_values_follow_the_polynomial(shape):
    """In float64; each value is mapped five times by a s + b s^3 + c s^5."""
    x = draw(shape).astype(np.float64)
    left, value, right = np.linalg.svd(x, full_matrices=False)
    value /= np.linalg.norm(x, axis=(1, 2))[:, None]
    for _ in range(5):
        a, b, c = COEFFICIENTS
        value = a * value + b * value**3 + c * value**5
    got = jax.jit(newton_schulz)(draw(shape))
    np.testing.assert_allclose(got, left * value[:, None] @ right, atol=1e-4)


def test_a_zero_matrix_stays_zero():
    assert not np.any(newton_schulz(np.zeros((2, 4, 6), np.float32)))
