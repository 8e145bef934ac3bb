"""Sorted rows, and tiles of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops import rows

NOBODY = -1


@pytest.mark.parametrize("aligned", [8, rows.ROW_TILE])
@pytest.mark.parametrize("experts", [1, 6])
def test_tiles_take_each_row_once_for_its_expert(experts, aligned):
    num_rows = 300 * experts
    row_tiles = jax.jit(rows.row_tiles, static_argnames=("num_rows", "aligned"))

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 300), min_size=experts, max_size=experts))
    def check(size_E):
        size_E = jnp.asarray(size_E)
        tile_T4 = np.asarray(row_tiles(size_E, num_rows=num_rows, aligned=aligned))
        count_E = rows.num_row_tiles(size_E, aligned=aligned)
        expert_M = np.full(num_rows, NOBODY)
        taken_E = np.zeros(experts, int)
        for expert, start, first, end in tile_T4:
            if first < end:
                assert start % aligned == 0 and start <= first
                assert end <= start + rows.ROW_TILE
                assert (expert_M[first:end] == NOBODY).all()
                expert_M[first:end] = expert
                taken_E[expert] += 1
        want = np.repeat([*range(experts), NOBODY], [*size_E, num_rows - sum(size_E)])
        np.testing.assert_array_equal(expert_M, want)
        np.testing.assert_array_equal(taken_E, count_E)

    check()
