"""Who lends to whom, so that every device gets its share of the rows.

Each borrower has one lender. As long as a device has more than its share, it fills up
others, each to its share, and the last of them may take it below its own: then the next
lender fills it up in turn. (So are alias tables made: Walker, 1977.) In the order of
sums, who fills whom is known without doing one after the other. Every device is filled
up at most once, hence from one lender's experts, of which there are E / P: with as many
slots, the balance is exact whatever the load is. P devices have at most P - 1
borrowers, and where no part of them is balanced by itself, no plan has fewer.

What a lender gives away is at most its surplus and what it is filled up with again. The
latter is less than a share, as nobody lacks more, so that it has the rows.

Whatever is ordered is so few that all pairs are compared, which takes fewer kernels
than sorting and cumulating.

Shapes: P device, L device as a lender, G node, M any number.
"""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_ROWS = 2**31 - 1  # of all devices together, so that sums are right in int32


class Flow(NamedTuple):
    """Rows that lenders give to borrowers; all int32 [P].

    lender_P: P where a device borrows nothing. start_P, rows_P: of the rows that its
    lender gives away, the first that it gets, and how many. given_P: how many rows it
    gives away itself.
    """

    lender_P: jax.Array
    start_P: jax.Array
    rows_P: jax.Array
    given_P: jax.Array


def find_flow(load_P: jax.Array, threshold: float, devices_per_node: int) -> Flow:
    """Returns who fills up whom: within nodes first, then between them."""
    devices = load_P.size
    share_P, most_P = _share_and_most(load_P, threshold)
    surplus_P = jnp.maximum(load_P - most_P, 0)
    # All room together is to fit in an int32. An even share always does.
    full_P = jnp.minimum(most_P, jnp.maximum(share_P, MAX_ROWS // devices))
    room_P = jnp.maximum(full_P - load_P, 0)
    if devices_per_node == devices:
        return _fill(surplus_P, room_P, devices)
    near = _fill(surplus_P, room_P, devices_per_node)
    # Who is filled up by a node's last lender may take that one below its share. It is
    # then filled up from another node: it still has one lender.
    room_P += jnp.maximum(near.given_P - surplus_P, 0)
    room_P = jnp.where(near.lender_P < devices, 0, room_P)
    far = _fill(jnp.maximum(surplus_P - near.given_P, 0), room_P, devices)
    given_P = jnp.append(near.given_P, 0)
    return Flow(
        jnp.minimum(near.lender_P, far.lender_P),
        near.start_P + far.start_P + given_P[far.lender_P],
        near.rows_P + far.rows_P,
        near.given_P + far.given_P,
    )


def _share_and_most(load_P: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array]:
    """Returns each device's even share, and how many rows it may have.

    Where rows don't divide evenly, the busiest have one more, so that none is lent only
    to have it elsewhere.
    """
    devices = load_P.size
    above = min(Fraction(str(threshold)).limit_denominator(1000), devices - 1)
    # One sum yields both a device's rank and the total: it is one kernel less.
    summed_2PP = jnp.stack([are_larger(load_P), jnp.tile(load_P, (devices, 1))])
    rank_P, total_P = summed_2PP.sum(-1, dtype=jnp.int32)
    mean_P, more_P = jnp.divmod(total_P, devices)
    # The mean times `above`, in factors that fit: a product of sums could overflow.
    whole_P, rest_P = jnp.divmod(mean_P, above.denominator)
    extra_P = whole_P * above.numerator
    extra_P += rest_P * above.numerator // above.denominator
    share_P = mean_P + (rank_P < more_P)
    return share_P, jnp.maximum(share_P, mean_P + extra_P)


def _fill(surplus_P: jax.Array, room_P: jax.Array, devices_per_node: int) -> Flow:
    """Returns who fills up whom within nodes, the most to give to the most room first.

    Of each node, room is laid out on one line and surplus on another. A device is
    filled up by the lender in whose stretch of the second its stretch of the first
    begins: up to its share, or as far as there is surplus anywhere.

    Shapes here: P and L device of a node.
    """
    devices = surplus_P.size
    surplus_GP, room_GP = (
        x_P.reshape(-1, devices_per_node) for x_P in (surplus_P, room_P)
    )
    to_fill_GP, first_GL = sum_of_larger(jnp.stack([room_GP, surplus_GP]))
    end_GL = first_GL + surplus_GP
    wanted_GP = jnp.clip(surplus_P.sum() - to_fill_GP, 0, room_GP)
    is_past_GPL = to_fill_GP[:, :, None] < end_GL[:, None]
    filled_GP1 = jnp.where(wanted_GP > 0, to_fill_GP + wanted_GP, 0)[:, :, None]
    asked_GL = jnp.where(is_past_GPL, filled_GP1, 0).max(1)
    given_GL = jnp.where(surplus_GP > 0, jnp.maximum(asked_GL - first_GL, 0), 0)
    # A lender that gave away too much is filled up by the next, before all others.
    overdrawn_GP = jnp.maximum(given_GL - surplus_GP, 0)
    begins_GP = jnp.where(overdrawn_GP > 0, end_GL, to_fill_GP)
    is_wanting_GP = (wanted_GP > 0) | (overdrawn_GP > 0)
    begins_GP1 = jnp.where(is_wanting_GP, begins_GP, -1)[:, :, None]
    is_lender_GPL = (first_GL[:, None] <= begins_GP1) & (begins_GP1 < end_GL[:, None])
    device_GP = jnp.arange(devices, dtype=jnp.int32).reshape(room_GP.shape)
    lender_GP = jnp.where(is_lender_GPL, device_GP[:, None], devices).min(2)
    rows_GP = jnp.where(lender_GP < devices, wanted_GP + overdrawn_GP, 0)
    first_P = jnp.append(first_GL, 0)
    start_GP = jnp.maximum(begins_GP - first_P[lender_GP], 0)
    start_GP = jnp.where(lender_GP < devices, start_GP, 0)
    return Flow(*(x.reshape(-1) for x in (lender_GP, start_GP, rows_GP, given_GL)))


def are_larger(x_XM: jax.Array) -> jax.Array:
    """Returns [..., M, M]: whether the second of two comes before the first.

    The larger does, or that of the lower index.
    """
    index_M = jnp.arange(x_XM.shape[-1])
    this, other = x_XM[..., :, None], x_XM[..., None, :]
    return (other > this) | ((other == this) & (index_M < index_M[:, None]))


def sum_of_larger(x_XM: jax.Array) -> jax.Array:
    """Returns the sum of what comes before each, the larger before the smaller."""
    return jnp.where(are_larger(x_XM), x_XM[..., None, :], 0).sum(-1)
