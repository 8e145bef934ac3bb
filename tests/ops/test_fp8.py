"""Block-scaled FP8 against what its format allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops import fp8

ROUNDING = 1 + 2**-22  # of the division and the product, in float32


def largest_of_blocks(x):
    """The largest magnitude of each element's block."""
    starts = np.arange(0, x.shape[-1], fp8.BLOCK)
    largest = np.maximum.reduceat(np.abs(x), starts, axis=-1)
    return np.repeat(largest, fp8.BLOCK, axis=-1)[..., : x.shape[-1]]


def round_trip(x, dtype=np.float32):
    return np.asarray(fp8.dequantize(fp8.quantize(jnp.asarray(x)), dtype))


def allowed_error(x):
    half_smallest_step = largest_of_blocks(x) / fp8.LARGEST * 2**-10
    return ROUNDING * np.maximum(np.abs(x) / 16, half_smallest_step)


@pytest.mark.parametrize(
    ("shape", "blocks"), [((3, 256), 2), ((2, 2, 200), 2), ((5, 7), 1), ((300,), 3)]
)
def test_the_error_is_within_the_formats_rounding(shape, blocks):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=shape, scale=4))
    x = x.astype(np.float32)
    got = fp8.quantize(jnp.asarray(x))
    assert got.data.dtype == fp8.DTYPE and got.data.shape == shape
    assert got.scale.dtype == np.float32
    assert got.scale.shape == (*shape[:-1], blocks)
    assert fp8.num_blocks(shape[-1]) == blocks
    error = np.abs(round_trip(x) - x)
    assert (error <= allowed_error(x)).all()
    assert error.max() > 0


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=9))
def test_any_finite_numbers_stay_finite_and_close(numbers):
    x = np.zeros(130, np.float32)
    x[: len(numbers)] = numbers
    tiny = np.finfo(np.float32).tiny  # below it, as zero: scales are normal numbers
    error = np.abs(round_trip(x) - x)
    assert (error <= np.maximum(allowed_error(x), tiny)).all()


def test_the_largest_of_a_block_is_exact_and_does_not_overflow():
    x = np.random.default_rng(0).uniform(-1e4, 1e4, (50, 128)).astype(np.float32)
    x[:, 5] = 465.0 * 1.7 ** np.arange(-25, 25)
    got = fp8.quantize(jnp.asarray(x))
    assert np.abs(got.data.astype(np.float32)).max(-1).tolist() == [448] * 50
    at = np.abs(x).argmax(-1)[:, None]
    want = np.take_along_axis(x, at, -1)
    np.testing.assert_allclose(
        np.take_along_axis(round_trip(x), at, -1), want, rtol=2**-22
    )


def test_an_outlier_disturbs_only_its_own_block():
    x = np.random.default_rng(0).normal(size=(2, 3 * fp8.BLOCK)).astype(np.float32)
    spoiled = x.copy()
    spoiled[1, fp8.BLOCK] = 1e6
    changed = round_trip(spoiled) != round_trip(x)
    assert changed[1, fp8.BLOCK : 2 * fp8.BLOCK].all()
    assert not changed[0].any() and changed.sum() == fp8.BLOCK


def test_zeros_stay_zeros():
    x = np.zeros((2, 200), np.float32)
    x[1, :128] = 1.0
    np.testing.assert_array_equal(round_trip(x), x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    x = np.ones((1, 256), np.float32)
    x[0, 3] = bad
    got = round_trip(x)
    assert np.isnan(got[0, 3]) and (got[0, fp8.BLOCK :] == 1).all()


def test_bfloat16_in_and_out():
    x = jax.random.normal(jax.random.key(0), (4, 130), jnp.bfloat16)
    got = round_trip(x, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(x, np.float32)
    error = np.abs(got.astype(np.float32) - want)
    assert (error <= allowed_error(want) + 2**-8 * np.abs(want)).all()
