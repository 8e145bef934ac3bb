"""Rows of tokens in a buffer of slots, each of which one visit may fill.

Shapes: N token, V visits of a token, P peer, R slot, a row of the buffer.

A visit knows its slot and a slot its token. So tokens are placed by a gather, and what
comes back is collected by V gathers: nothing is scattered but slot numbers. Placing and
collecting are each other's transposes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmoe.balance.dropping import Visits


class Slots(NamedTuple):
    """token_R: int32; N where the slot is empty. slot_NV: int32; R or more for none."""

    token_R: jax.Array
    slot_NV: jax.Array


def keep(visits: Visits, rank_NV: jax.Array, capacity_P: jax.Array) -> jax.Array:
    """Returns which visits exist and are within their peer's capacity, bool [N, V].

    Those of ranks below 0 aren't: they were in an earlier part.
    """
    capacity_NV = jnp.append(capacity_P, 0)[visits.peer_NV]
    is_within_NV = (rank_NV >= 0) & (rank_NV < capacity_NV)
    return (visits.peer_NV < len(capacity_P)) & is_within_NV


def assign(
    visits: Visits,
    rank_NV: jax.Array,
    is_kept_NV: jax.Array,
    first_P: jax.Array,
    num_slots: int,
) -> Slots:
    """Gives each kept visit its slot: a peer's lie from `first_P` on, by rank."""
    tokens, most = rank_NV.shape
    nowhere_NV = num_slots + jnp.arange(tokens * most).reshape(tokens, most)
    slot_NV = jnp.append(first_P, 0)[visits.peer_NV] + rank_NV
    slot_NV = jnp.where(is_kept_NV, slot_NV, nowhere_NV).astype(jnp.int32)
    token_N1 = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    token_R = jnp.full(num_slots, tokens, jnp.int32)
    token_R = token_R.at[slot_NV].set(token_N1, mode="drop", unique_indices=True)
    return Slots(token_R, slot_NV)


def place(x_NX: jax.Array, token_R: jax.Array) -> jax.Array:
    """Returns the rows of the slots' tokens, [R, X]; zeros where a slot is empty."""
    return x_NX.at[token_R].get(mode="fill", fill_value=0)


def collect(y_RX: jax.Array, slots: Slots) -> jax.Array:
    """Returns the sum of each token's rows, [N, X].

    It is in float32 and the order of its visits.
    """
    total = jnp.float32(0)
    for slot_N in slots.slot_NV.T:
        row_NX = y_RX.at[slot_N].get(mode="fill", fill_value=0)
        total += row_NX.astype(jnp.float32)
    return total.astype(y_RX.dtype)
