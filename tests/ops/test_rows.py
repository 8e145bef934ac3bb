"""Sorted rows, and tiles of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops import rows

NOBODY = -1


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_sorted_by_expert_then_by_token_and_nobodys_come_last(seed, by_keys):
    tokens, choices, experts = 50, 3, 5
    expert_TK = np.random.default_rng(seed).integers(0, experts + 1, (tokens, choices))
    got = rows.sort_rows(jnp.asarray(expert_TK), experts, spare=4, by_keys=by_keys)
    order_N = sorted(range(expert_TK.size), key=lambda n: (expert_TK.flat[n], n))
    np.testing.assert_array_equal(got.choice_N, order_N + 4 * [0])
    np.testing.assert_array_equal(got.token_N, np.array(order_N + 4 * [0]) // choices)
    size_E = np.bincount(expert_TK.flat, minlength=experts + 1)[:experts]
    np.testing.assert_array_equal(got.size_E, size_E)
    assert {x.dtype.name for x in got} == {"int32"}


def test_keys_are_sorted_only_if_an_int32_can_hold_them():
    """Their last one is (experts + 1) * rows - 1."""

    def sorted_arrays(tokens):
        expert_TK = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda x: rows.sort_rows(x, 255, spare=0, by_keys=True))(
            expert_TK
        )
        sort = "= sort["
        (line,) = [line for line in str(jaxpr).splitlines() if sort in line]
        return line.split(sort)[0].count("i32")

    assert sorted_arrays(2**22 - 1) == 1
    assert sorted_arrays(2**22) == 2  # experts, and the rows that go along


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
