"""What formats leave of an array's blocks, against float64, block by block."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops import blocks
from jmoe.ops.formats import E5M6
from tests.ops.format_tables import e5m6_of_blocks

ROUNDED = jax.jit(blocks.rounded, static_argnums=(1, 2), static_argnames="power_of_two")
BLOCKS = {
    "row": blocks.ROW,
    "column": blocks.transposed(blocks.ROW),
    "tensor": blocks.TENSOR,
}


def left(x, block=blocks.ROW):
    return np.asarray(ROUNDED(x, block, E5M6, power_of_two=True))


@pytest.mark.parametrize("block", BLOCKS)
def test_e5m6_leaves_what_the_oracle_does_to_the_bit(block):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(140, 300)) * np.exp(5 * rng.normal(size=(140, 300)))
    x[:, :2], x[:, 5] = 0, 1e-30
    x[0, -1] = E5M6.largest * 2.0**20  # whose scale is a power of two as it is
    x = x.astype(np.float32)
    of_both = {"row": (1, blocks.BLOCK)}.get(block, BLOCKS[block])
    want = e5m6_of_blocks(x.astype(np.float64), of_both)
    got = left(x, BLOCKS[block])
    assert got.tobytes() == want.astype(np.float32).tobytes()
    assert (got != x).any()


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=9))
def test_no_finite_number_saturates_or_moves_by_more_than_half_a_step(numbers):
    x = np.zeros(130, np.float32)
    x[: len(numbers)] = numbers
    scale = max(2 * np.abs(x).max() / E5M6.largest, E5M6.smallest_scale)
    error = np.abs(left(x).astype(np.float64) - x)
    tiny = np.finfo(np.float32).tiny  # below it, some devices have zeros
    assert (error <= np.maximum(np.abs(x) * 2.0**-7, scale * 2.0**-21) + tiny).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_block_and_no_other(bad):
    x = np.ones((2, 300), np.float32)
    x[1, 200] = bad
    spoiled = np.zeros(x.shape, bool)
    spoiled[1, 128:256] = True
    np.testing.assert_array_equal(np.isnan(left(x)), spoiled)
    np.testing.assert_array_equal(left(x)[~spoiled], 1)
