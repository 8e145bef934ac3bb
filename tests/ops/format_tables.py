"""All numbers of the formats of few bits, and rounding to them, in float64."""

import itertools

import numpy as np

from jmoe.ops import blocks
from jmoe.ops.formats import E4M3, E5M6


def numbers_of(exponent_bits, mantissa_bits, codes):
    """Returns the first codes' numbers, float64: all that are finite and positive."""
    code = np.arange(codes)
    exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
    bias = 2 ** (exponent_bits - 1) - 1
    leading = np.where(exponent > 0, 2**mantissa_bits, 0)
    steps = np.float64(leading + mantissa)
    return steps * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)


# Of e4m3's codes, the last is NaN; of e5m6's, those with the largest exponent are
# infinity and NaN.
NUMBERS = {E4M3: numbers_of(4, 3, 2**7 - 1), E5M6: numbers_of(5, 6, 31 * 2**6)}


def nearest(x, format):
    """The nearest number of the table to each float64, of two that of an even code."""
    table = NUMBERS[format]
    above = np.searchsorted(table, np.abs(x)).clip(1, len(table) - 1)
    below = above - 1
    to_above, to_below = table[above] - np.abs(x), np.abs(x) - table[below]
    takes_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.copysign(table[np.where(takes_above, above, below)], x)


def e5m6_of_blocks(x, block):
    """Each block divided by a power of two, rounded to the table's numbers, and back.

    The power is the smallest with which the block's largest is at most the format's.
    """
    sizes = [
        dim if size == blocks.WHOLE else size
        for dim, size in zip(x.shape, block, strict=True)
    ]
    want = np.zeros(x.shape)
    starts = (range(0, dim, size) for dim, size in zip(x.shape, sizes, strict=True))
    for place in itertools.product(*starts):
        here = tuple(slice(p, p + n) for p, n in zip(place, sizes, strict=True))
        largest = max(np.abs(x[here]).max() / E5M6.largest, E5M6.smallest_scale)
        scale = 2.0 ** np.ceil(np.log2(largest))
        want[here] = scale * nearest(x[here] / scale, E5M6)
    return want
