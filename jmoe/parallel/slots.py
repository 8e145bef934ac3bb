"""Rows of tokens in a buffer of slots, each of which one visit may fill.

Shapes: N token, V visits of a token, P peer, S slot.

A visit knows its slot and a slot its token. So tokens are placed by a gather, and what
comes back is collected by V gathers: nothing is scattered but slot numbers. Placing and
collecting are each other's transposes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmoe.balance.dropping import Visits


class Slots(NamedTuple):
    """token_S: int32; N where the slot is empty. slot_NV: int32; S or more for none."""

    token_S: jax.Array
    slot_NV: jax.Array


def keep(visits: Visits, rank_NV: jax.Array, room_P: jax.Array) -> jax.Array:
    """Which visits exist and rank before the room of their peer ends, bool [N, V]."""
    room_NV = jnp.append(room_P, 0)[visits.peer_NV]
    return (visits.peer_NV < len(room_P)) & (rank_NV < room_NV)


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
    token_S = jnp.full(num_slots, tokens, jnp.int32)
    token_S = token_S.at[slot_NV].set(token_N1, mode="drop", unique_indices=True)
    return Slots(token_S, slot_NV)


def place(x_NX: jax.Array, slots: Slots) -> jax.Array:
    """The rows of the slots' tokens, [S, X]; zeros where a slot is empty."""
    return x_NX.at[slots.token_S].get(mode="fill", fill_value=0)


def collect(y_SX: jax.Array, slots: Slots) -> jax.Array:
    """The sum of each token's rows, [N, X], in float32 and the order of its visits."""
    total = jnp.float32(0)
    for slot_N in slots.slot_NV.T:
        row_NX = y_SX.at[slot_N].get(mode="fill", fill_value=0)
        total += row_NX.astype(jnp.float32)
    return total.astype(y_SX.dtype)
