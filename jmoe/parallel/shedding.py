"""Choices that an overloaded device doesn't compute: the least important ones.

A device computes no more than so many choices of a layer. What is above that is shared
out between the devices that send (`dropping.share_capacity`); each of them lets go of
the choices with the lowest gates, but never of a token's most important one: so a
device may have some more than it should. What is left of a token keeps its gates.

The limit is data: whether anything is dropped, and how much, is decided while a program
runs, and where there is no limit nothing is exchanged or sorted.

Shapes: N token, K choice of a token, P device of the `expert` axis.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.balance import dropping
from jmoe.parallel import collectives
from jmoe.parallel.travel import AXIS

NO_LIMIT = 2**31 - 1


def shed(
    place_NK: jax.Array, gate_NK: jax.Array, limit: jax.Array, places: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the choices that stay, and how many of this device's tokens' went.

    An all-gather over `expert` of a count for each device, if there is a limit.

    Args:
      place_NK: int32, where each choice is to be computed; `places` is nobody.
      limit: int32, of a device's choices in this layer; NO_LIMIT: there is none.
    """

    def limited() -> jax.Array:
        peers = collectives.axis_size(AXIS)
        count_P = dropping.count_choices(place_NK, places, peers)
        count_PP = collectives.all_gather(count_P[None], AXIS, 0)
        # A device's tokens are those of all its tensor group.
        most = limit // collectives.axis_size("tensor")
        share = jax.vmap(dropping.share_capacity, (1, None), 1)
        allowed_P = share(count_PP, most)[collectives.axis_index(AXIS)]
        return dropping.least_important_dropped(place_NK, gate_NK, allowed_P, places)

    kept_NK = lax.cond(limit < NO_LIMIT, limited, lambda: place_NK)
    return kept_NK, (kept_NK != place_NK).sum(dtype=jnp.int32)
