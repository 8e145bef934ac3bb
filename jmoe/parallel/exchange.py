"""Tokens to the devices that host their experts, and back."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmoe.config import ExchangeConfig, RouterConfig
from jmoe.parallel import collectives


class Exchanged(NamedTuple):
    """The experts' weighted sums, and int32 counts of choices without room."""

    y_ND: jax.Array
    dropped_sending: jax.Array
    dropped_receiving: jax.Array


def exchange(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    experts: Callable[..., jax.Array],
    cfg: ExchangeConfig,
    router: RouterConfig,
) -> Exchanged:
    """All tokens go to all devices."""
    peers, none = collectives.axis_size("expert"), jnp.int32(0)
    if peers == 1:
        return Exchanged(experts(x_ND, expert_NK, gate_NK), none, none)
    tokens = (collectives.gather(x, "expert", 0) for x in (x_ND, expert_NK, gate_NK))
    x_RD, expert_RK, gate_RK = tokens
    own = router.num_experts // peers
    local_RK = expert_RK - collectives.axis_index("expert") * own
    local_RK = jnp.where((local_RK >= 0) & (local_RK < own), local_RK, own)
    y_RD = experts(x_RD, local_RK, gate_RK)
    return Exchanged(collectives.scatter_sum(y_RD, "expert", 0), none, none)
