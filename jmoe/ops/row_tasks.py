"""Sorted rows in tasks: a task is up to B rows of one expert.

Shapes: N row, E expert, M task, B rows of a block, R rows of one compiled size, I input
and O output dimension.

A loop takes one task after another. What a task computes has the smallest compiled size
that holds its rows, so that padding is small and its arrays stay in the cache.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 256
STEP = 32  # compiled sizes are STEP, 2 STEP, ... B rows
FEW = (1, 4, 8, 16)  # and these, where a decoder's steps have few rows of an expert


class Tasks(NamedTuple):
    """Holds at most M tasks, in the order of rows, of which the first `count` exist."""

    expert_M: jax.Array
    start_M: jax.Array  # first row
    rows_M: jax.Array  # how many, at most B
    count: jax.Array


def block_rows(num_tokens: int) -> int:
    """Returns B, rows of a block.

    It is no more than BLOCK, nor than compiled sizes for one row of each token need.
    """
    return min(BLOCK, STEP * max(1, -(-num_tokens // STEP)))


def plan_tasks(size_E: jax.Array, num_rows: int, block: int, *, skip: int = 0) -> Tasks:
    """Cuts each expert's rows into tasks of at most `block`; idle experts get none.

    Args:
      num_rows: at least the sum of `size_E`; decides M.
      skip: how many of each expert's tasks to leave out, from its first.
    """
    tasks_E = jnp.maximum(-(-size_E // block) - skip, 0)
    end_E = jnp.cumsum(tasks_E)
    index_M = jnp.arange(size_E.shape[0] + num_rows // block, dtype=jnp.int32)
    # The default is a loop, whose start takes longer than all these comparisons.
    expert_M = jnp.searchsorted(
        end_E, index_M, side="right", method="compare_all"
    ).astype(jnp.int32)
    expert_M = jnp.minimum(expert_M, size_E.shape[0] - 1)
    nth_M = index_M - (end_E - tasks_E)[expert_M] + skip
    start_M = first_rows(size_E)[expert_M] + nth_M * block
    rows_M = jnp.clip(size_E[expert_M] - nth_M * block, 0, block)
    return Tasks(expert_M, start_M, rows_M, end_E[-1])


def first_rows(size_E: jax.Array) -> jax.Array:
    return jnp.cumsum(size_E) - size_E


def over_experts(run, size_E: jax.Array, shape_TK: tuple[int, ...], carry):
    """Calls `run(expert, start, own, carry, write)` for all tasks.

    Each expert's first task comes first.

    Most experts have one task: it writes the weights' gradient, without reading it.
    """
    tokens, choices = shape_TK
    first_E, block = first_rows(size_E), block_rows(tokens)

    def run_first(e, carry):
        return run(e, first_E[e], jnp.minimum(size_E[e], block), carry, write)

    carry = lax.fori_loop(0, size_E.shape[0], run_first, carry)
    if tokens <= block:  # so no expert has a second task, as a token's are distinct
        return carry
    later = plan_tasks(size_E, tokens * choices, block, skip=1)

    def run_later(i, carry):
        return run(
            later.expert_M[i], later.start_M[i], later.rows_M[i], carry, write_sum
        )

    return lax.fori_loop(0, later.count, run_later, carry)


def zeros_after(
    x_TD: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns zeros that cannot be made before x is.

    XLA makes constant zeros of one shape once, copies them for each layer, and all of
    that at the start of a step, where they stay: as much memory again as the gradients.
    """
    zero = jnp.minimum(jnp.abs(x_TD[0, 0]), 0)
    return jnp.broadcast_to(zero.astype(dtype), shape)


def in_smallest_size(
    rows: jax.Array,
    block: int,
    chain: Callable[[int], Any],
    few: tuple[int, ...] = (),
) -> Any:
    """Returns `chain(size)` for the smallest compiled size of at least `rows` rows.

    Args:
      few: sizes below STEP that are compiled too.
    """
    sizes = [*few, *range(STEP, block + 1, STEP)]
    branches = [functools.partial(chain, size) for size in sizes]
    return lax.switch(sum(rows > size for size in sizes[:-1]), branches)


def add_own(
    total: jax.Array, index_B: jax.Array, value: jax.Array, own: jax.Array
) -> jax.Array:
    """Adds the first `own` of the B rows of `value`, to distinct rows of `total`."""
    row_B = jnp.arange(value.shape[0])
    nowhere_B = total.shape[0] + row_B  # out of bounds, which scatter drops
    index_B = jnp.where(row_B < own, index_B, nowhere_B)
    value = value.astype(total.dtype)
    return total.at[index_B].add(value, mode="drop", unique_indices=True)


def write(total_EIO: jax.Array, expert: jax.Array, value_IO: jax.Array) -> jax.Array:
    # As rows that are scattered: XLA updates a slice on one core, these on all.
    experts, inputs, outputs = total_EIO.shape
    row_I = expert * inputs + jnp.arange(inputs)
    total = total_EIO.reshape(experts * inputs, outputs)
    total = total.at[row_I].set(
        value_IO,
        mode="promise_in_bounds",
        indices_are_sorted=True,
        unique_indices=True,
    )
    return total.reshape(total_EIO.shape)


def write_sum(
    total_EIO: jax.Array, expert: jax.Array, value_IO: jax.Array
) -> jax.Array:
    return write(total_EIO, expert, pick(total_EIO, expert) + value_IO)


def pad(x: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x, [(0, block - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def pick(w: jax.Array, index: jax.Array) -> jax.Array:
    # To move a part of an array of e4m3, XLA for CPUs converts all of it, and back.
    bits = lax.bitcast_convert_type(w, jnp.uint8) if w.dtype.itemsize == 1 else w
    picked = lax.dynamic_index_in_dim(bits, index, keepdims=False)
    return picked if bits is w else lax.bitcast_convert_type(picked, w.dtype)


def write_rows(total: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(total, rows, start, 0)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")
