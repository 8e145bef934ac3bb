"""Rows sorted by expert, taken in segments: arrays of a fixed number of rows.

How many rows there are is up to the router. The first segment is always computed, and
a loop takes as many later ones as there are.

Shapes: T token, K choice of a token, D hidden, E expert, N row (one choice of one
token), M row of a segment.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.rows import Rows, sort_rows

TILE = 128  # rows that a block of GPU threads works on at a time


class Lengths(NamedTuple):
    """How many rows the first segment has, and each later one; are these rare."""

    first: int
    later: int
    are_later_rare: bool = False

    def of_sums(self, dtype: Any) -> Any:
        """Returns the dtype in which results of this one add up over segments.

        In float32, arrays for what is rare would take twice the room in every step.
        """
        return dtype if self.are_later_rare else jnp.float32


class RowPlan(NamedTuple):
    """`rows`, with spare ones to whole segments; the row of each choice; those owned.

    Rows from `owned` on are nobody's.
    """

    rows: Rows
    row_TK: jax.Array
    owned: jax.Array


class Segment(NamedTuple):
    """M rows from row `start` on, of which `size_E` are each expert's."""

    start: jax.Array
    choice_M: jax.Array
    token_M: jax.Array
    is_owned_M: jax.Array
    size_E: jax.Array


def lengths_of(
    shape_TK: tuple[int, ...], rows: int | None, *, is_bound: bool, apart: bool
) -> Lengths:
    """Returns lengths for about `rows` rows that aren't nobody's; all, if it is None.

    The first segment holds these, and as many as there are tokens; but no more with
    `apart`, as XLA puts little between the start and the end of a collective in a long
    one. If more rows than these are rare (`is_bound`), it holds just these, and later
    ones have a quarter of the tokens.
    """
    tokens, top_k = shape_TK
    most = tokens * top_k if rows is None else min(rows, tokens * top_k)
    if is_bound:
        first = max(min(most, tokens) if apart else most, 1)
        return Lengths(_whole_tiles(first), _whole_tiles(-(-tokens // 4)), True)
    first = tokens if apart else max(tokens, most)
    return Lengths(_whole_tiles(first), _whole_tiles(tokens))


def _whole_tiles(rows: int) -> int:
    return -(-rows // TILE) * TILE


def _num_later(rows: jax.Array | int, lengths: Lengths) -> Any:
    """Returns how many segments these rows need, besides the first."""
    return -(-(rows - lengths.first) // lengths.later)


def plan_rows(expert_TK: jax.Array, num_experts: int, lengths: Lengths) -> RowPlan:
    """Returns where rows lie that are sorted by expert."""
    most = lengths.first + max(0, _num_later(expert_TK.size, lengths)) * lengths.later
    spare = most - expert_TK.size
    rows = sort_rows(expert_TK, num_experts, spare=spare)
    choice_N = rows.choice_N[: expert_TK.size]
    index_N = jnp.arange(expert_TK.size, dtype=jnp.int32)
    row_N = jnp.zeros_like(choice_N).at[choice_N].set(index_N, unique_indices=True)
    return RowPlan(rows, row_N.reshape(expert_TK.shape), rows.size_E.sum())


def over_segments(
    plan: RowPlan, lengths: Lengths, compute: Callable[[Segment], Any]
) -> Any:
    """Returns the sum of a tree of arrays over all segments that have rows."""
    return add_later(plan, lengths, compute, compute(cut(plan, 0, lengths.first)))


def add_later(
    plan: RowPlan, lengths: Lengths, compute: Callable[[Segment], Any], first: Any
) -> Any:
    """Adds later segments' results to those of the first, as `over_segments` does."""

    def add(i, total):
        segment = cut(plan, lengths.first + i * lengths.later, lengths.later)
        return jax.tree.map(jnp.add, total, compute(segment))

    if plan.rows.choice_N.size == lengths.first:
        return first
    return lax.fori_loop(0, _num_later(plan.owned, lengths), add, first)


def cut(plan: RowPlan, row: jax.Array | int, length: int) -> Segment:
    """Returns the segment of so many rows from this one on."""
    start = jnp.asarray(row, jnp.int32)
    choice_M, token_M = (
        lax.dynamic_slice_in_dim(x, start, length) for x in plan.rows[:2]
    )
    end_E = jnp.cumsum(plan.rows.size_E)
    first_E = end_E - plan.rows.size_E
    within_E = (jnp.clip(x, start, start + length) for x in (first_E, end_E))
    is_owned_M = start + jnp.arange(length) < plan.owned
    first_E, end_E = within_E
    return Segment(start, choice_M, token_M, is_owned_M, end_E - first_E)


def spread(x_TD: jax.Array, segment: Segment) -> jax.Array:
    """Returns each row's token; nobody's rows have some token's."""
    return x_TD.at[segment.token_M].get(mode="promise_in_bounds")


def collect(rows: jax.Array, plan: RowPlan, segment: Segment) -> jax.Array:
    """Returns each choice's row of [M, ...], float32; zeros where it isn't there."""
    local_TK = plan.row_TK - segment.start
    inside_TK = (local_TK >= 0) & (local_TK < segment.size_E.sum())
    picked = rows.at[jnp.where(inside_TK, local_TK, 0)].get(mode="promise_in_bounds")
    inside = inside_TK.reshape(inside_TK.shape + (1,) * (rows.ndim - 1))
    return jnp.where(inside, picked.astype(jnp.float32), 0)
