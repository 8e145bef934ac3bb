"""Where rows lie when devices send each other as many as they have, and no more.

Shapes: P peer; a PP array is of what its row's device sends to its column's.

A *ragged* all-to-all has no slots: the rows for a peer follow those for the one before
it, in the sender's buffer, and those from a peer those from the one before it, in the
receiver's. Every device knows how many rows every other has for whom, and so computes
the same layout of all buffers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.balance import dropping
from jmoe.parallel import collectives


class Sizes(NamedTuple):
    """One device's part in one direction, as `lax.ragged_all_to_all` wants it.

    from_P, send_P: first row and number of rows for each peer, in this buffer.
    to_P: in the peer's buffer, the row from which they are written there.
    receive_P: how many come from each peer.
    """

    from_P: jax.Array
    send_P: jax.Array
    to_P: jax.Array
    receive_P: jax.Array


class RoundTrip(NamedTuple):
    """The way to the experts' devices, and the way back."""

    there: Sizes
    back: Sizes


def send(
    rows_NX: jax.Array, arrived_NX: jax.Array, sizes: Sizes, axes: collectives.Axes
) -> jax.Array:
    """Returns `arrived_NX` with the rows that peers sent here written into it."""
    as_int32 = (size.astype(jnp.int32) for size in sizes)
    return lax.ragged_all_to_all(rows_NX, arrived_NX, *as_int32, axis_name=axes)


def zeros(size: int, rows_NX: jax.Array) -> jax.Array:
    """Returns so many rows of zeros, for such rows to arrive in."""
    return jnp.zeros((size, *rows_NX.shape[1:]), rows_NX.dtype)


def late_zeros(size: int, rows_NX: jax.Array) -> jax.Array:
    """Returns so many rows of zeros, for such rows to arrive in; made after these are.

    XLA makes constant zeros at the start of a step, and all of them stay until then.
    """
    zero = lax.optimization_barrier((jnp.zeros((), rows_NX.dtype), rows_NX))[0]
    return jnp.broadcast_to(zero, (size, *rows_NX.shape[1:]))


def shared(count_PP: jax.Array, rows: int) -> jax.Array:
    """Returns how many of its rows each device sends, if each can receive `rows`.

    Senders whose rows are beyond a peer's capacity share it (`share_capacity`).
    """
    share = jax.vmap(dropping.share_capacity, in_axes=(1, None), out_axes=1)
    return share(count_PP, rows)


def window(
    count_PP: jax.Array, rows: int, nth: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Returns how many rows are in the nth part, of `rows` that each receives in one.

    And how many are in parts before it. Rows are received in the order of senders.
    """
    before_PP = jnp.cumsum(count_PP, axis=0) - count_PP
    skipped_PP = jnp.clip(nth * rows - before_PP, 0, count_PP)
    end_PP = jnp.clip((nth + 1) * rows - before_PP, 0, count_PP)
    return end_PP - skipped_PP, skipped_PP


def plan(size_PP: jax.Array, device: jax.Array | int) -> RoundTrip:
    """Returns what `device` sends and receives, if these are the rows that travel."""
    sent_from_PP = jnp.cumsum(size_PP, axis=1) - size_PP
    received_at_PP = jnp.cumsum(size_PP, axis=0) - size_PP
    to_others, from_others = size_PP[device], size_PP[:, device]
    return RoundTrip(
        Sizes(sent_from_PP[device], to_others, received_at_PP[device], from_others),
        Sizes(
            received_at_PP[:, device], from_others, sent_from_PP[:, device], to_others
        ),
    )
