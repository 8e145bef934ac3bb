"""Choices of experts, sorted by expert: the order in which grouped matmuls want them.

Shapes: T token, K choice of a token, N = T * K rows (a row is one choice of one token),
E expert; expert E is "nobody". In a product of all experts, M row, I input and O output
dimension.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def _dimensions(left: int, right: int, *, experts: Sequence[int]) -> Any:
    """Returns dimension numbers of a `lax.ragged_dot_general` over these two.

    Rows are the left's first.
    """
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([left], [right]), ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=experts,
    )


DOT = _dimensions(1, 1, experts=[0])  # MI, EIO -> MO
DOT_TRANSPOSED = _dimensions(1, 2, experts=[0])  # MO, EIO -> MI
OUTER = _dimensions(0, 0, experts=[])  # MI, MO -> EIO


class Rows(NamedTuple):
    """Choices sorted by expert; "nobody" comes last, then spare rows of token 0.

    choice_N: the row's choice, an index into a flattened TK. token_N: its token.
    size_E: rows of each expert.
    """

    choice_N: jax.Array
    token_N: jax.Array
    size_E: jax.Array


def count(expert_NK: jax.Array, num_experts: int) -> jax.Array:
    """Returns the exact int32 number of choices of each expert, [E], without nobody."""
    chosen = expert_NK.reshape(-1, 1) == jnp.arange(num_experts)
    return chosen.sum(0, dtype=jnp.int32)


def sort_rows(
    expert_TK: jax.Array, num_experts: int, *, spare: int, by_keys: bool = False
) -> Rows:
    """Sorts rows by expert, each expert's in the order of their tokens.

    `spare` rows are added.

    Args:
      by_keys: sort numbers that hold expert and row, where an int32 can. It takes CPUs
        a fifth of the time; compiled for Hopper GPUs, fewer exchanges would hide behind
        products.
    """
    expert_N = expert_TK.reshape(-1).astype(jnp.int32)
    num_rows = expert_N.size
    if by_keys and (num_experts + 1) * num_rows <= jnp.iinfo(jnp.int32).max:
        key_N = expert_N * num_rows + jnp.arange(num_rows, dtype=jnp.int32)
        choice_N = jnp.sort(key_N) % num_rows
    else:
        choice_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    choice_N = jnp.pad(choice_N, (0, spare))
    size_E = count(expert_N, num_experts)
    return Rows(choice_N, choice_N // expert_TK.shape[1], size_E)


ROW_TILE = 128


def row_tiles(size_E: jax.Array, num_rows: int, *, aligned: int) -> jax.Array:
    """Returns tiles of ROW_TILE rows, each of one expert, that have all of its rows.

    [T, 4] int32: the expert, the tile's first row, and from which to before which row
    it is the expert's. Its tiles start at the last multiple of `aligned`, which divides
    ROW_TILE, before its rows. Tiles are in the order of rows; those of none come last.
    """
    size_E = size_E.astype(jnp.int32)
    end_E = jnp.cumsum(size_E)
    first_E = end_E - size_E
    start_E = first_E // aligned * aligned
    count_E = num_row_tiles(size_E, aligned=aligned)
    end_tile_E = jnp.cumsum(count_E)
    # Of each expert, at most this many rows are added to fill up its first and last.
    most = num_rows + (aligned - 1 + ROW_TILE - 1) * size_E.shape[0]
    tile_T = jnp.arange(most // ROW_TILE, dtype=jnp.int32)
    expert_T = jnp.searchsorted(end_tile_E, tile_T, side="right").astype(jnp.int32)
    is_tile_T = expert_T < size_E.shape[0]
    expert_T = jnp.where(is_tile_T, expert_T, 0)
    nth_T = tile_T - (end_tile_E - count_E)[expert_T]
    start_T = start_E[expert_T] + nth_T * ROW_TILE
    start_T = jnp.where(is_tile_T, start_T, 0)
    own_T = jnp.maximum(first_E[expert_T], start_T)
    end_T = jnp.minimum(end_E[expert_T], start_T + ROW_TILE)
    return jnp.stack([expert_T, start_T, own_T, jnp.where(is_tile_T, end_T, 0)], 1)


def num_row_tiles(size_E: jax.Array, *, aligned: int) -> jax.Array:
    """Returns how many tiles each expert has."""
    end_E = jnp.cumsum(size_E)
    start_E = (end_E - size_E) // aligned * aligned
    return jnp.where(size_E > 0, -(-(end_E - start_E) // ROW_TILE), 0)
