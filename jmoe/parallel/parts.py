"""Tokens on their way in parts, of which a device's buffer of R rows holds one.

Of all visits, a device receives R in the first part, in the order of who pays them, as
many in the next, and so on. On GPUs rows travel by a ragged all-to-all. CPUs lack it.
There, a dense one would have room for all of a device's tokens to go to one peer, as
those of one text often do: so all devices get all tokens, as many, and each keeps those
that visit it. What is computed then has R rows on either.

Shapes as in `jmoe.parallel.travel`.
"""

import math

import jax
import jax.numpy as jnp

from jmoe.balance import dropping
from jmoe.config import RouterConfig
from jmoe.parallel import collectives, ragged, slots, travel
from jmoe.parallel.travel import AXIS

ROOM, DEVIATIONS = 1.2, 4
"""What buffers hold where no `capacity_factor` is set: times the expected visits.

And so many standard deviations of a count of rare events, which few tokens need.
"""


def capacity(
    factor: float | None, tokens: int, router: RouterConfig, share: int
) -> int:
    """Returns R, no more than a device's even share, `share` rows, without a factor.

    Args:
      factor: R as a multiple of the expected visits; or None.
      tokens: of each device.
    """
    of_router = tokens, router, collectives.axis_size(AXIS)
    if factor is not None:
        return dropping.receive_capacity(factor, *of_router)
    expected = dropping.receive_capacity(1.0, *of_router)
    room = math.ceil(ROOM * expected + DEVIATIONS * math.sqrt(expected))
    return min(room, dropping.receive_capacity(None, *of_router), share)


def count(trips: travel.Trips, rows: int) -> jax.Array:
    """Returns how many parts of `rows` the device with the most visits has, int32."""
    return -(-trips.count_PP.sum(0).max() // rows)


def path(trips: travel.Trips, rows: int, nth: jax.Array | int) -> travel.Path:
    """Returns how the rows of the nth part move."""
    if collectives.platform() == "cpu":
        return _gathered(trips, rows, nth)
    return travel.TRANSPORTS["ragged"].path(trips, rows, nth)


def _gathered(trips: travel.Trips, rows: int, nth: jax.Array | int) -> travel.Path:
    """Brings all tokens to each device, and what is returned to each is summed there.

    Sums are in float32, and the order of devices.
    """
    peers, me = collectives.axis_size(AXIS), collectives.axis_index(AXIS)
    peer_NV = trips.visits.peer_NV
    size_PP, rank_NV = travel.window(trips, rows, nth)
    is_kept_NV = slots.keep(trips.visits, rank_NV, size_PP[me])
    first_P = jnp.append(ragged.plan(size_PP, me).there.to_P, 0)
    row_NV = jnp.where(is_kept_NV, first_P[peer_NV] + rank_NV, rows)
    is_to_NVP = peer_NV[:, :, None] == jnp.arange(peers)
    row_NP = jnp.where(is_to_NVP, row_NV[:, :, None], rows).min(1)
    row_PN = collectives.all_to_all(row_NP.T, AXIS, 0, 0)
    token_PN = jnp.arange(row_PN.size, dtype=jnp.int32).reshape(row_PN.shape)
    token_R = jnp.full(rows, row_PN.size, jnp.int32)
    token_R = token_R.at[row_PN].set(token_PN, mode="drop")

    def there(x_NX, token_R):
        return slots.place(collectives.all_gather(x_NX, AXIS, 0), token_R)

    def back(y_RX, token_R):
        y_XX = jnp.zeros((row_PN.size, y_RX.shape[1]), jnp.float32)
        y_XX = y_XX.at[token_R].set(y_RX.astype(jnp.float32), mode="drop")
        return collectives.reduce_scatter(y_XX, AXIS, 0).astype(y_RX.dtype)

    return travel.Path(there, back, token_R, is_kept_NV)
