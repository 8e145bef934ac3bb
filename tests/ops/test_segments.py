"""Segments hold what there is, once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops import segments

E = 5


@functools.partial(jax.jit, static_argnums=1)
def segments_computed(expert_TK, lengths):
    plan = segments.plan_rows(expert_TK, E, lengths)
    return segments.over_segments(plan, lengths, lambda s: (jnp.int32(1), s.size_E))


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(0, E), min_size=60, max_size=60),
    st.sampled_from([(8, 8), (24, 8), (20, 60), (60, 60), (64, 24)]),
)
def test_segments_hold_each_row_once_and_nobodys_rows_add_none(choices, lengths):
    expert_TK = np.array(choices, np.int32).reshape(20, 3)
    lengths = segments.Lengths(*lengths)
    count, size_E = segments_computed(expert_TK, lengths)
    np.testing.assert_array_equal(size_E, np.bincount(choices, minlength=E + 1)[:E])
    left_over = max(0, int(size_E.sum()) - lengths.first)
    assert count == 1 + -(-left_over // lengths.later)
