"""Casts, transposes and block FP8 against numpy and ml_dtypes, number by number."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from jmoe.export import numerics
from jmoe.export.numerics import BFLOAT16, FLOAT8, FLOAT16, FLOAT32

ANY_BITS = arrays.arrays(np.uint32, st.integers(1, 40))
SIDES = st.integers(1, 300)


def noise(rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(rows * columns)
    return rng.standard_normal((rows, columns)).astype(np.float32)


@hypothesis.given(ANY_BITS)
def test_bfloat16_is_rounded_as_ml_dtypes_does_from_any_bits(bits):
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        want = x.astype(ml_dtypes.bfloat16)
    got = numerics.cast(x, BFLOAT16)
    is_nan = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), is_nan)
    assert got[~is_nan].tobytes() == want[~is_nan].tobytes()


@hypothesis.given(arrays.arrays(np.uint16, st.integers(1, 40)))
def test_bfloat16_survives_a_visit_to_float32_bit_by_bit(bits):
    x = bits.view(BFLOAT16)
    is_quiet = ~np.isnan(x.astype(np.float32)) | (bits & 0x40 > 0)
    back = numerics.cast(numerics.cast(x, FLOAT32), BFLOAT16)
    assert back[is_quiet].tobytes() == x[is_quiet].tobytes()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16, FLOAT8], ids=str)
@hypothesis.given(arrays.arrays(np.uint32, st.integers(1, 3)))
def test_numbers_are_finite_as_numpy_says_of_any_bits(dtype, bits):
    x = bits.view(dtype)
    with np.errstate(all="ignore"):
        want = np.isfinite(x.astype(np.float32)).all()
    assert numerics.is_finite(x) == want
    special = np.array([1, -np.inf if dtype != FLOAT8 else np.nan], dtype)
    assert numerics.is_finite(special[:1]) and not numerics.is_finite(special)


def test_one_number_that_is_not_finite_is_found_wherever_it_is():
    x = np.zeros((3, 200_000), np.float32)[:, ::2]  # several pieces, strided
    assert numerics.is_finite(x)
    for place in [(0, 0), (1, 50_000), (2, -1)]:
        x[place] = np.nan
        assert not numerics.is_finite(x)
        x[place] = 0


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT8], ids=str)
@hypothesis.given(rows=SIDES, columns=SIDES)
def test_a_strided_matrix_is_transposed(dtype, rows, columns):
    x = noise(rows, 2 * columns).astype(dtype).reshape(rows, 2, columns)[:, 1]
    out = np.empty((columns, rows), dtype)
    numerics.transpose(out, x)
    assert out.tobytes() == np.ascontiguousarray(x.T).tobytes()


@pytest.mark.parametrize("shape", [(129,), (3, 70_000), (1, 1)], ids=str)
def test_rows_are_copied_and_converted(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    out = np.empty(shape, BFLOAT16)
    numerics.copy(out, x)
    assert out.tobytes() == x.astype(BFLOAT16).tobytes()


def reference_fp8(x_NK):
    """A block's scale is its largest magnitude over 448; both in the block's place."""
    scale = np.empty([-(-side // 128) for side in x_NK.shape], np.float32)
    stored = np.empty(x_NK.shape, FLOAT8)
    for i, j in np.ndindex(*scale.shape):
        block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        scale[i, j] = np.abs(x_NK[block]).max() / np.float32(448) or 1
        stored[block] = (x_NK[block] / scale[i, j]).clip(-448, 448).astype(FLOAT8)
    return stored, scale


@hypothesis.given(rows=SIDES, columns=SIDES, size=st.sampled_from([1e-30, 1, 1e30]))
def test_fp8_is_each_blocks_share_of_its_largest(rows, columns, size):
    x_KN = noise(rows, columns) * np.float32(size)
    x_KN[:128, :128] *= rows % 2  # a block of zeros
    stored, scale = reference_fp8(np.ascontiguousarray(x_KN.T))
    out, scale_out = np.empty_like(stored), np.empty_like(scale)
    numerics.quantize_transposed(out, scale_out, x_KN)
    assert (out.tobytes(), scale_out.tobytes()) == (stored.tobytes(), scale.tobytes())
    assert not np.isnan(out.astype(np.float32)).any()


def test_fp8_is_off_by_at_most_a_sixteenth_where_it_is_not_tiny():
    x_KN = noise(300, 200)
    stored, scale = reference_fp8(x_KN.T)
    back = np.empty(x_KN.shape, np.float32)
    numerics.dequantize_transposed(back, stored, scale)
    largest = np.abs(x_KN).max()
    assert (np.abs(back - x_KN) <= np.maximum(np.abs(x_KN) / 16, largest / 2**15)).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("origin", [(0, 0), (100, 5), (128, 130), (290, 0)])
def test_a_part_of_fp8_is_dequantized_as_in_the_whole(dtype, origin):
    stored, scale = reference_fp8(noise(300, 200))
    wide = scale.repeat(128, 0)[:300].repeat(128, 1)[:, :200]
    whole = (stored.astype(np.float32) * wide).astype(dtype)
    part = np.s_[origin[0] : origin[0] + 150, origin[1] : origin[1] + 60]
    out = np.empty(stored[part].T.shape, dtype)
    numerics.dequantize_transposed(out, stored[part], scale, origin)
    assert out.tobytes() == np.ascontiguousarray(whole[part].T).tobytes()
