"""Masks of positions against loops over them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops import masks


@pytest.mark.parametrize("by", [0, 1, 3, 5])
def test_a_shift_brings_what_stands_later_and_zeros_from_beyond_the_end(by):
    x_ABT = np.arange(1, 31).reshape(2, 3, 5)
    got = np.asarray(masks.shift_left(jnp.asarray(x_ABT), by))
    for t in range(5):
        want = x_ABT[..., t + by] if t + by < 5 else 0
        np.testing.assert_array_equal(got[..., t], want)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31 - 1), st.integers(0, 3), st.booleans())
def test_a_position_reaches_real_tokens_of_its_own_document(seed, depth, confined):
    rng = np.random.default_rng(seed)
    is_real_BT = rng.random((2, 6)) < 0.8
    segment_BT = rng.integers(0, 3, (2, 6)).cumsum(1)
    got = masks.reaches(depth, is_real_BT, segment_BT if confined else None)
    for b, t in np.ndindex(2, 6):
        want = t + depth < 6 and is_real_BT[b, t] and is_real_BT[b, t + depth]
        if want and confined:
            want = segment_BT[b, t] == segment_BT[b, t + depth]
        assert bool(got[b, t]) == bool(want)
