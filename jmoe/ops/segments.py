"""Rows of an array that is too long to be held, some at a time: segments.

Shapes: T token, K choice of a token, E expert, D hidden, N row (one choice of one
token), M row of a segment.

Rows are sorted by expert. How many there are is up to the router, and so how many
segments; the first is always computed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.rows import Rows, sort_rows


class Lengths(NamedTuple):
    """How many rows the first segment has, and each later one."""

    first: int
    later: int


class Plan(NamedTuple):
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


def _num_later(rows: jax.Array | int, lengths: Lengths) -> Any:
    """How many segments these rows need, besides the first."""
    return -(-(rows - lengths.first) // lengths.later)


def has_later(plan: Plan, lengths: Lengths) -> bool:
    """Whether there is room for rows in more than the first segment."""
    return plan.rows.choice_N.size > lengths.first


def make_plan(expert_TK: jax.Array, num_experts: int, lengths: Lengths) -> Plan:
    most = lengths.first + max(0, _num_later(expert_TK.size, lengths)) * lengths.later
    spare = most - expert_TK.size
    rows = sort_rows(expert_TK, num_experts, spare=spare)
    choice_N = rows.choice_N[: expert_TK.size]
    index_N = jnp.arange(expert_TK.size, dtype=jnp.int32)
    row_N = jnp.zeros_like(choice_N).at[choice_N].set(index_N, unique_indices=True)
    return Plan(rows, row_N.reshape(expert_TK.shape), rows.size_E.sum())


def over_segments(
    plan: Plan, lengths: Lengths, compute: Callable[[Segment], Any]
) -> Any:
    """The sum of a tree of arrays over all segments that have rows."""

    def add(segment, total):
        return jax.tree.map(jnp.add, total, compute(segment))

    first = compute(cut(plan, 0, lengths.first))
    return add_later(plan, lengths, add, first)


def add_later(
    plan: Plan, lengths: Lengths, add: Callable[[Segment, Any], Any], total: Any
) -> Any:
    """`total`, to which `add` has added all segments that have rows, but the first."""

    def add_one(i, total):
        row = lengths.first + i * lengths.later
        return add(cut(plan, row, lengths.later), total)

    if not has_later(plan, lengths):
        return total
    return lax.fori_loop(0, _num_later(plan.owned, lengths), add_one, total)


def cut(plan: Plan, row: jax.Array | int, length: int) -> Segment:
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
    """Each row's token; nobody's rows have some token's."""
    return x_TD.at[segment.token_M].get(mode="promise_in_bounds")


def collect(rows: jax.Array, plan: Plan, segment: Segment) -> jax.Array:
    """Each choice's row of an array [M, ...], float32; zeros where it isn't there."""
    local_TK = plan.row_TK - segment.start
    inside_TK = (local_TK >= 0) & (local_TK < segment.size_E.sum())
    picked = rows.at[jnp.where(inside_TK, local_TK, 0)].get(mode="promise_in_bounds")
    inside = inside_TK.reshape(inside_TK.shape + (1,) * (rows.ndim - 1))
    return jnp.where(inside, picked.astype(jnp.float32), 0)
