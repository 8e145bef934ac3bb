"""Tokens that experts have chosen, to the experts' devices and back.

The second form of dispatch, for expert choice (arXiv 2202.09368): each expert takes as
many tokens as any other, so that rows have places of their own from the start, and one
dense all-to-all each way moves nothing in vain and drops nothing.

Shapes: B sequence, S this device's positions, T all positions, D hidden, E expert, C
tokens of a sequence that an expert takes, P device of the `expert` axis, R row here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.parallel import collectives
from jmoe.parallel.travel import AXIS, Group


def exchange_picks(
    x_BSD: jax.Array,
    position_BEC: jax.Array,
    gate_BEC: jax.Array,
    is_real_BEC: jax.Array,
    compute: Callable[[jax.Array, Group], jax.Array],
    weights: Any,
) -> jax.Array:
    """Returns the summed outputs of the experts that have picked a token, [B, S, D].

    An all-gather over `tensor`, all-to-alls over `expert`, and a reduce-scatter over
    `tensor`.

    Args:
      position_BEC: int32, among all T positions; the same on all devices of `tensor`.
      is_real_BEC: bool, which picks count.
      compute: of a part of each of this device's experts, as `tensor` divides them, of
        whose `weights` it is given.
    """
    sequences, num_experts, capacity = position_BEC.shape
    own = collectives.share(num_experts, AXIS, "num_experts")
    x_BTD = collectives.all_gather(x_BSD, "tensor", 1)
    x_BECD = jax.vmap(lambda x_TD, at_EC: x_TD[at_EC])(x_BTD, position_BEC)

    def there(x_BECX: jax.Array) -> jax.Array:
        """Returns what this device's experts have picked on all devices, [R, X]."""
        x_EX = x_BECX.swapaxes(0, 1).reshape(num_experts, sequences * capacity, -1)
        here = collectives.all_to_all(x_EX, AXIS, 0, 1)
        return here.reshape(-1, here.shape[-1])

    told_BEC2 = jnp.stack([gate_BEC, is_real_BEC.astype(gate_BEC.dtype)], axis=-1)
    x_RD, told_R2 = there(x_BECD), there(told_BEC2)
    expert_R = jnp.repeat(jnp.arange(own, dtype=jnp.int32), x_RD.shape[0] // own)
    expert_R = jnp.where(told_R2[:, 1] > 0, expert_R, own)
    group = Group(expert_R[:, None], told_R2[:, :1], weights, len(expert_R))
    y_RD = compute(x_RD, group)
    back = collectives.all_to_all(y_RD.reshape(own, -1, y_RD.shape[-1]), AXIS, 1, 0)
    y_EBCD = back.reshape(num_experts, sequences, capacity, -1)

    def add(at_EC: jax.Array, y_ECD: jax.Array) -> jax.Array:
        zeros = jnp.zeros(x_BTD.shape[1:], jnp.float32)
        return zeros.at[at_EC].add(y_ECD.astype(jnp.float32))

    y_BTD = jax.vmap(add)(position_BEC, y_EBCD.swapaxes(0, 1)).astype(x_BSD.dtype)
    return collectives.reduce_scatter(y_BTD, "tensor", 1)
