"""Formats of few bits against tables of all their numbers, and against XLA."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmoe.ops import formats
from jmoe.ops.formats import E4M3, E5M6
from tests.ops import format_tables
from tests.ops.format_tables import NUMBERS

NEAREST = jax.jit(formats.nearest, static_argnums=1)
each_format = pytest.mark.parametrize("format", NUMBERS, ids=["e4m3", "e5m6"])


@each_format
def test_a_format_says_of_itself_what_its_numbers_are(format):
    table = NUMBERS[format]
    assert (table[1], table[-1]) == (format.smallest_step, format.largest)
    assert table[2**format.mantissa_bits] == format.smallest_normal


@each_format
def test_numbers_stay_and_all_others_become_the_nearest_of_two_the_even_one(format):
    table = np.float32(NUMBERS[format])
    assert (table == NUMBERS[format]).all()
    tie = (table[1:] + table[:-1]) / 2
    random = np.exp2(np.random.default_rng(0).uniform(-24, 15.98, 100_000))
    others = [np.nextafter(tie, np.float32(to)) for to in (0, np.inf)]
    x = np.concatenate([table, tie, *others, np.minimum(random, format.largest)])
    x = np.concatenate([x, -x]).astype(np.float32)
    got = np.asarray(NEAREST(x, format))
    want = format_tables.nearest(x.astype(np.float64), format)
    assert got.tobytes() == want.astype(np.float32).tobytes()  # zeros' signs too
    assert np.array_equal(got[: len(table)], table)


@each_format
def test_beyond_the_largest_by_a_rounding_is_the_largest_and_nan_stays(format):
    x = np.float32([np.nextafter(np.float32(format.largest), np.inf), np.nan])
    got = np.asarray(NEAREST(x, format))
    assert got[0] == format.largest and np.isnan(got[1])


def test_numbers_of_e5m6_times_their_scales_are_numbers_of_bfloat16():
    scales = 2.0 ** np.arange(np.log2(E5M6.smallest_scale), 113)
    x = np.outer(scales, NUMBERS[E5M6])
    kept = x.astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(kept.astype(np.float64), x)
    normal = np.abs(x[x != 0]).min() >= np.finfo(np.float32).tiny
    assert normal  # numbers below that are zeros on some devices


def test_every_number_is_converted_to_e4m3_as_xla_does():
    small = np.arange(-(2**12), 2**12) * 2.0**-12 * E4M3.smallest_normal  # ties as well
    large = np.exp2(np.linspace(-11, np.log2(448), 100_001))
    x = np.concatenate([small, large, -large, [448, np.nan, 0.0, -0.0]])
    x = jnp.asarray(x, jnp.float32)
    want = x.astype(formats.E4M3_DTYPE)
    got = jax.jit(formats.to_e4m3)(x)
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    nearest = np.asarray(NEAREST(x, E4M3))
    assert nearest.tobytes() == np.asarray(want, np.float32).tobytes()
