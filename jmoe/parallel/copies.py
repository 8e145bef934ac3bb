"""Copies of experts on their way to other places, while nobody computes.

Who gets what is data (`jmoe.balance.copies`): one program makes any step. Weights
travel as borrowed ones do (`jmoe.parallel.loans`), and overwrite others in place.

Shapes: M place of this device, P device of the `expert` axis, X whatever else an array
has.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jmoe.parallel import collectives, loans
from jmoe.parallel.travel import AXIS

_AS_THEY_ARE = loans.Form(lambda w: w, lambda w, dtype: w)


def copy(x_MX: jax.Array, source_P: jax.Array, target_P: jax.Array) -> jax.Array:
    """Returns this device's part behind a step; in place where `x_MX` is donated.

    Args:
      source_P: int32, the place of all devices that each one gets a copy of; target_P:
        its own place that the copy goes to. As many as there are places, or more:
        nothing.
    """
    lent: Any = loans.lend(x_MX, source_P[:, None], _AS_THEY_ARE)
    _, came_1X = lent
    me, own = collectives.axis_index(AXIS), len(x_MX)
    at = target_P[me] - me * own
    at = jnp.where((at >= 0) & (at < own), at, own)
    return x_MX.at[at].set(came_1X[0], mode="drop")
