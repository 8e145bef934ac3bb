"""Tokens to the devices that compute their experts, and their results back.

Shapes: N token of this device, D hidden, K choice of a token, P device of the `expert`
axis (a *peer*), R row that arrives here, E expert. Device p is the home of the experts
from p * E / P up to (p + 1) * E / P.

A token travels once to each device that computes one of its experts, together with its
choices and their gates. There, the experts' weighted outputs are summed, and travel
back as one row; the token's device adds up what returns. Backends differ in how rows
move (`parallel.travel`), and `balanced` also in where experts are computed:

- `padded`, `ragged`, `gather`: at home. What is beyond a capacity factor is dropped.
- `balanced`: every device computes as many rows as any other (`parallel.balanced`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.balance import dropping
from jmoe.config import ExchangeConfig, RouterConfig
from jmoe.ops import fp8
from jmoe.parallel import balanced, collectives, travel
from jmoe.parallel.travel import AXIS, Experts, Group


class Exchanged(NamedTuple):
    """The experts' weighted sums, and int32 counts of choices that were not computed.

    The counts are of this device's tokens, by whose capacity was too small: that of the
    buffers it sends from, or of those its peers receive into. metrics: what a backend
    measures besides, as `jmoe.nn.measured` has it.
    """

    y_ND: jax.Array
    dropped_sending: jax.Array
    dropped_receiving: jax.Array
    metrics: Mapping[str, Any]


def exchange(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    experts: Experts,
    weights: Any,
    cfg: ExchangeConfig,
    router: RouterConfig,
    *,
    recipe: fp8.Recipe | None = None,
    remat: bool = False,
) -> Exchanged:
    """Returns each token's chosen experts, weighed and summed, wherever they are.

    On one device `experts` is called as it is. On more, each of `cfg.chunks` parts of
    the tokens makes its own way, so that one's can overlap with another's computation.

    Args:
      expert_NK: int32 in [0, E]; E is nobody.
      gate_NK: float32.
      weights: a tuple of this device's, which `experts` is given.
      recipe: by which weights are multiplied, in whose FP8 they are lent; None: as they
        are.
      remat: borrowed weights are fetched again in the backward pass, not kept for it.

    Raises:
      ValueError: the experts don't divide over the devices, or the tokens into chunks;
        or there are more slots for borrowed experts than other devices have.
    """
    none = jnp.int32(0)
    if collectives.axis_size(AXIS) == 1:
        everything = Group(expert_NK, gate_NK, weights, expert_NK.size)
        return Exchanged(experts(x_ND, [everything]), none, none, {})
    if x_ND.shape[0] % cfg.chunks:
        raise ValueError(
            f"chunks={cfg.chunks} must divide a device's {x_ND.shape[0]} tokens."
        )
    tokens = x_ND, expert_NK, gate_NK
    if cfg.backend == "balanced":
        y_ND, metrics = balanced.exchange(
            *tokens, experts, weights, cfg, router, recipe=recipe, remat=remat
        )
        return Exchanged(y_ND, none, none, metrics)
    x, expert, gate = (jnp.split(part, cfg.chunks) for part in tokens)
    done = [
        _exchange_chunk(*chunk, experts, weights, cfg, router)
        for chunk in zip(x, expert, gate, strict=True)
    ]
    y, dropped = zip(*done, strict=True)
    dropped = jnp.stack(dropped).sum(dtype=jnp.int32)
    is_sending = travel.TRANSPORTS[cfg.backend].where == "sending"
    counts = (dropped, none) if is_sending else (none, dropped)
    return Exchanged(jnp.concatenate(y), *counts, {})


def _exchange_chunk(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    experts: Experts,
    weights: Any,
    cfg: ExchangeConfig,
    router: RouterConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns results, and how many choices were dropped."""
    peers, transport = collectives.axis_size(AXIS), travel.TRANSPORTS[cfg.backend]
    order = "position" if cfg.capacity_factor is None else cfg.drop_order
    trips = travel.plan(transport.plan, expert_NK, gate_NK, router, order)
    path = transport.path(
        trips, transport.capacity(cfg.capacity_factor, len(x_ND), router, peers)
    )
    wire = travel.WIRES[cfg.dispatch_dtype]
    own = collectives.share(router.num_experts, AXIS, "num_experts")
    arrived = travel.bring(path, wire, x_ND, expert_NK, gate_NK, router.num_experts)
    group = Group(*arrived.choices_of(0, own), weights, expert_NK.size)
    y_ND = path.carry_back(experts(arrived.x_RD, [group]))
    return y_ND, dropping.dropped_choices(trips.visits, path.is_kept_NV)


BACKENDS = (*travel.TRANSPORTS, "balanced")
