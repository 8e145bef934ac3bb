"""Number formats and layouts of weights, as numpy moves them: quickly, off the GIL.

A matrix is [in, out] with us and [out, in] with Hugging Face, so that every weight is
transposed on its way, panel by panel: a panel's rows stay in the processor's cache. The
same functions serve both directions.

Block FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3): a block of 128 x 128 weights
shares a float32 scale, its largest magnitude over 448; stored are the quotients as e4m3
and the scale, which Hugging Face calls `weight_scale_inv`.

Shapes: I rows of the source, O its columns; a block dimension is one 128th, rounded up.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

BLOCK = 128
FP8_MAX = 448.0  # of e4m3; what exceeds it would turn into NaN
FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

_PANEL_ROWS = 64
_CHUNK = 1 << 18  # elements of a vector converted at a time

_QUIET_NAN = np.uint32(0x7FC00000)
# The bits that are all set in what isn't finite, and together in nothing else.
_NOT_FINITE = {
    FLOAT32: np.uint32(0x7F800000),
    FLOAT16: np.uint16(0x7C00),
    BFLOAT16: np.uint16(0x7F80),
    FLOAT8: np.uint8(0x7F),
}
_VALUE_OF_FP8 = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to even: as every framework does."""
    bits = x.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    is_nan = np.isnan(x)
    if is_nan.any():  # the sum above may have carried into the sign
        rounded[is_nan] = bits[is_nan] | _QUIET_NAN
    rounded >>= np.uint32(16)
    return rounded.astype(np.uint16).view(BFLOAT16)


def _widen_bfloat16(x: np.ndarray) -> np.ndarray:
    wide = x.view(np.uint16).astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _widen_float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _float16_to_bfloat16(x: np.ndarray) -> np.ndarray:
    return _round_to_bfloat16(_widen_float16(x))


_CASTS: dict[tuple[np.dtype, np.dtype], Callable[[np.ndarray], np.ndarray]] = {
    (FLOAT32, BFLOAT16): _round_to_bfloat16,
    (BFLOAT16, FLOAT32): _widen_bfloat16,
    (FLOAT16, FLOAT32): _widen_float16,
    (FLOAT16, BFLOAT16): _float16_to_bfloat16,
}


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns `x` as `dtype`, rounded to nearest; `x` itself if it has that type."""
    return x if x.dtype == dtype else _CASTS[x.dtype, np.dtype(dtype)](x)


def copy(out: np.ndarray, x: np.ndarray) -> None:
    """Sets `out[:] = x`, converted to the type of `out`."""
    for start in range(0, len(x), _rows(x)):
        rows = slice(start, start + _rows(x))
        out[rows] = cast(x[rows], out.dtype)


def transpose(out_OI: np.ndarray, x_IO: np.ndarray) -> None:
    """Sets `out[:] = x.T`, converted to the type of `out`."""
    raw_OI = _raw(out_OI)
    for start in range(0, len(x_IO), _PANEL_ROWS):
        rows = slice(start, start + _PANEL_ROWS)
        raw_OI[:, rows] = _raw(cast(x_IO[rows], out_OI.dtype)).T


def quantize_transposed(
    out_OI: np.ndarray, scale_out: np.ndarray, x_IO: np.ndarray
) -> None:
    """Writes the e4m3 weights and block scales of `x.T`.

    Args:
      out_OI: e4m3, is written.
      scale_out: float32 [O / 128, I / 128] (rounded up), is written.
      x_IO: float32 or bfloat16. A block that is all zeros gets the scale 1.
    """
    raw_OI = _raw(out_OI)
    columns = x_IO.shape[1]
    starts = np.arange(0, columns, BLOCK)
    for number, start in enumerate(range(0, len(x_IO), BLOCK)):
        rows = slice(start, start + BLOCK)
        panel = cast(x_IO[rows], FLOAT32)
        largest = np.maximum.reduceat(np.abs(panel).max(axis=0), starts)
        scale = np.where(largest > 0, largest / np.float32(FP8_MAX), np.float32(1))
        scale_out[:, number] = scale
        quotient = panel / np.repeat(scale, BLOCK)[:columns]
        np.clip(quotient, -FP8_MAX, FP8_MAX, out=quotient)
        raw_OI[:, rows] = _raw(quotient.astype(FLOAT8)).T


def dequantize_transposed(
    out_OI: np.ndarray,
    x_IO: np.ndarray,
    scale: np.ndarray,
    origin: tuple[int, int] = (0, 0),
) -> None:
    """Sets `out[:] = (x * scale).T`, each block of e4m3 with its own scale.

    Args:
      out_OI: float32 or bfloat16, is written.
      scale: float32 [I / 128, O / 128] (rounded up), of the whole matrix.
      origin: row and column of the whole matrix at which `x_IO` begins.
    """
    (first_row, first_column), (rows, columns) = origin, x_IO.shape
    column_block = (first_column + np.arange(columns)) // BLOCK
    raw_OI = _raw(out_OI)
    for block in range(first_row // BLOCK, blocks(first_row + rows)):
        start = max(0, block * BLOCK - first_row)
        here = slice(start, (block + 1) * BLOCK - first_row)
        values = np.take(_VALUE_OF_FP8, _raw(x_IO[here]))
        values *= scale[block, column_block]
        raw_OI[:, here] = _raw(cast(values, out_OI.dtype)).T


def is_finite(x: np.ndarray) -> bool:
    """Returns whether all of `x`, of at least one dimension, is finite."""
    bits = _NOT_FINITE[x.dtype]
    raw = _raw(x)
    for start in range(0, len(x), _rows(x)):
        if ((raw[start : start + _rows(x)] & bits) == bits).any():
            return False
    return True


def blocks(size: int) -> int:
    """Returns how many blocks cover a dimension."""
    return -(-size // BLOCK)


def _rows(x: np.ndarray) -> int:
    return max(1, _CHUNK * len(x) // max(1, x.size))


def _raw(x: np.ndarray) -> np.ndarray:
    """Returns the bits, which numpy moves faster than numbers it doesn't know."""
    return x.view(f"u{x.itemsize}")
