"""Tokens to the devices that host their experts, and their results back.

Shapes: N token of this device, D hidden, K choice of a token, P device of the `expert`
axis (a *peer*), V most visits of a token, C slots a peer, R row that arrives here, E
expert. Device p hosts the experts from p * E / P up to (p + 1) * E / P.

A token travels once to each device that hosts one of its experts, together with its
choices and their gates. There, the experts' weighted outputs are summed, and travel
back as one row; the token's device adds up what returns. Backends differ in how rows
move:

- `padded`: a dense all-to-all of C slots for each peer.
- `ragged`: as many rows as there are. Only GPUs have this all-to-all.
- `gather`: every token to every device; to measure the others by.

All of them move rows by a pair of functions that are each other's transposes: `there`
carries tokens forward and the gradients of results backward, `back` the reverse. Tokens
may travel in FP8, gradients and results never do (DeepSeek-V3, arXiv 2412.19437,
section 3.3.3).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.balance import dropping
from jmoe.config import ExchangeConfig, RouterConfig
from jmoe.ops import fp8
from jmoe.parallel import collectives, ragged, slots

AXIS = "expert"

Experts = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`experts(x_RD, expert_RK, gate_RK) -> y_RD`, of the experts that this device hosts.

expert_RK: int32 in [0, E / P]; the last is "nobody", and contributes nothing, neither
to a result nor to a gradient. The contract of `jmoe.ops.grouped`.
"""


class Exchanged(NamedTuple):
    """The experts' weighted sums, and int32 counts of choices that were not computed.

    The counts are of this device's tokens, by whose capacity was too small: that of the
    buffers it sends from, or of those its peers receive into.
    """

    y_ND: jax.Array
    dropped_sending: jax.Array
    dropped_receiving: jax.Array


def exchange(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    experts: Experts,
    cfg: ExchangeConfig,
    router: RouterConfig,
) -> Exchanged:
    """Returns each token's chosen experts, weighed and summed, wherever they are.

    On one device `experts` is called as it is. On more, each of `cfg.chunks` parts of
    the tokens makes its own way, so that one's can overlap with another's computation.

    Args:
      expert_NK: int32 in [0, E]; E is nobody.
      gate_NK: float32.

    Raises:
      ValueError: the experts don't divide over the devices, or the tokens into chunks.
    """
    none = jnp.int32(0)
    if collectives.axis_size(AXIS) == 1:
        return Exchanged(experts(x_ND, expert_NK, gate_NK), none, none)
    if x_ND.shape[0] % cfg.chunks:
        raise ValueError(
            f"chunks={cfg.chunks} must divide a device's {x_ND.shape[0]} tokens."
        )
    x, expert, gate = (jnp.split(y, cfg.chunks) for y in (x_ND, expert_NK, gate_NK))
    done = [
        _exchange_chunk(*chunk, experts, cfg, router)
        for chunk in zip(x, expert, gate, strict=True)
    ]
    y, sending, receiving = zip(*done, strict=True)
    dropped = (jnp.stack(n).sum(dtype=jnp.int32) for n in (sending, receiving))
    return Exchanged(jnp.concatenate(y), *dropped)


def _exchange_chunk(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    experts: Experts,
    cfg: ExchangeConfig,
    router: RouterConfig,
) -> Exchanged:
    own = collectives.share(router.num_experts, AXIS, "num_experts")
    path = BACKENDS[cfg.backend](expert_NK, gate_NK, cfg, router)
    x_RD = path.carry(x_ND, WIRES[cfg.dispatch_dtype])
    # 0 is nobody on the way: slots that no token fills are zeros.
    number_NK = jnp.where(expert_NK < router.num_experts, expert_NK + 1, 0)
    choices_NX = jnp.concatenate([number_NK.astype(jnp.float32), gate_NK], axis=1)
    number_RK, gate_RK = jnp.split(path.carry(choices_NX, AS_IT_IS), 2, axis=1)
    local_RK = number_RK.astype(jnp.int32) - 1 - collectives.axis_index(AXIS) * own
    y_RD = experts(x_RD, *_of_own_experts(local_RK, gate_RK, own))
    y_ND = path.carry_back(y_RD)
    return Exchanged(y_ND, path.dropped_sending, path.dropped_receiving)


def _of_own_experts(
    local_RK: jax.Array, gate_RK: jax.Array, own: int
) -> tuple[jax.Array, jax.Array]:
    """Returns choices of this device's experts, 0 to `own`; others are nobody's.

    Where a device has fewer experts than a token has choices, a column for each of them
    holds as much, and the grouped matmul has fewer rows to sort and to make room for.
    """
    if own >= local_RK.shape[1]:
        is_own_RK = (local_RK >= 0) & (local_RK < own)
        return jnp.where(is_own_RK, local_RK, own), gate_RK
    expert_E = jnp.arange(own, dtype=jnp.int32)
    is_chosen_REK = local_RK[:, None] == expert_E[:, None]
    expert_RE = jnp.where(is_chosen_REK.any(-1), expert_E, own)
    return expert_RE, jnp.where(is_chosen_REK, gate_RK[:, None], 0).sum(-1)


class Wire(NamedTuple):
    """The form in which rows travel.

    pack(x_NX) -> rows; unpack(rows, X, dtype) -> x_NX.
    """

    pack: Callable[[jax.Array], jax.Array]
    unpack: Callable[[jax.Array, int, Any], jax.Array]


AS_IT_IS = Wire(lambda x_NX: x_NX, lambda x_NX, dim, dtype: x_NX)


def _to_bytes(x_NX: jax.Array) -> jax.Array:
    """Returns uint8: e4m3 numbers, then the bytes of their scales, powers of two."""
    data, scale = fp8.quantize(x_NX, power_of_two=True)
    parts = [jax.lax.bitcast_convert_type(part, jnp.uint8) for part in (data, scale)]
    return jnp.concatenate([part.reshape(len(x_NX), -1) for part in parts], axis=1)


def _from_bytes(bytes_NX: jax.Array, dim: int, dtype: Any) -> jax.Array:
    data_NX, scale_NX = bytes_NX[:, :dim], bytes_NX[:, dim:]
    scale_NX4 = scale_NX.reshape(len(bytes_NX), -1, 4)
    quantized = fp8.Quantized(
        jax.lax.bitcast_convert_type(data_NX, fp8.DTYPE),
        jax.lax.bitcast_convert_type(scale_NX4, jnp.float32),
    )
    return fp8.dequantize(quantized, dtype)


WIRES = {"activations": AS_IT_IS, "float8_e4m3fn": Wire(_to_bytes, _from_bytes)}

Move = Callable[[jax.Array, Any], jax.Array]
"""`move(rows, route)`: rows of any width and dtype, from device to device."""


class Path(NamedTuple):
    """How one chunk's rows move; `there` and `back` are each other's transposes.

    there: from [N, X] to [R, X], where rows that nothing arrives at are zeros.
    back: from [R, X] to [N, X], the sum of a token's rows.
    route: arrays that they need.
    """

    there: Move
    back: Move
    route: Any
    dropped_sending: jax.Array
    dropped_receiving: jax.Array

    def carry(self, x_NX: jax.Array, wire: Wire) -> jax.Array:
        with jax.named_scope("dispatch"):
            return _carry(self.there, self.back, wire, x_NX, self.route)

    def carry_back(self, y_RX: jax.Array) -> jax.Array:
        with jax.named_scope("combine"):
            return _carry(self.back, self.there, AS_IT_IS, y_RX, self.route)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _carry(forth: Move, back: Move, wire: Wire, x_NX: jax.Array, route: Any):
    """Moves rows `forth`, and their gradients, as they are, `back`."""
    rows = forth(wire.pack(x_NX), route)
    return wire.unpack(rows, x_NX.shape[1], x_NX.dtype)


def _carry_forward(forth, back, wire, x_NX, route):
    return _carry(forth, back, wire, x_NX, route), route


def _carry_backward(forth, back, wire, route, d_rows):
    return back(d_rows, route), None


_carry.defvjp(_carry_forward, _carry_backward)


def padded(
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    cfg: ExchangeConfig,
    router: RouterConfig,
) -> Path:
    """Moves C slots to each peer, of which those without a visit travel empty."""
    peers, tokens = collectives.axis_size(AXIS), len(expert_NK)
    capacity = dropping.send_capacity(cfg.capacity_factor, tokens, router, peers)
    visits = dropping.find_visits(expert_NK, gate_NK, router, peers)
    rank_NV = _rank(visits, cfg, peers)
    is_kept_NV = slots.keep(visits, rank_NV, jnp.full(peers, capacity))
    first_P = jnp.arange(peers) * capacity
    route = slots.assign(visits, rank_NV, is_kept_NV, first_P, peers * capacity)

    def there(x_NX, route):
        x_PCX = slots.place(x_NX, route).reshape(peers, capacity, -1)
        return collectives.all_to_all(x_PCX, AXIS, 0, 0).reshape(peers * capacity, -1)

    def back(y_RX, route):
        y_PCX = collectives.all_to_all(y_RX.reshape(peers, capacity, -1), AXIS, 0, 0)
        return slots.collect(y_PCX.reshape(peers * capacity, -1), route)

    dropped = dropping.dropped_choices(visits, is_kept_NV)
    return Path(there, back, route, dropped, jnp.int32(0))


def ragged_rows(
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    cfg: ExchangeConfig,
    router: RouterConfig,
    all_to_all: Callable[..., jax.Array] = jax.lax.ragged_all_to_all,
) -> Path:
    """Moves as many rows as there are visits, of which a peer may not take all."""
    peers, tokens = collectives.axis_size(AXIS), len(expert_NK)
    rows = dropping.receive_capacity(cfg.capacity_factor, tokens, router, peers)
    visits = dropping.find_visits(expert_NK, gate_NK, router, peers)
    count_P = dropping.count_visits(visits, peers)
    count_PP = collectives.all_gather(count_P[None], AXIS, 0)
    layout = ragged.plan(count_PP, rows, collectives.axis_index(AXIS))
    rank_NV = _rank(visits, cfg, peers)
    is_kept_NV = slots.keep(visits, rank_NV, layout.there.send_P)
    send_rows = visits.peer_NV.size
    held = slots.assign(visits, rank_NV, is_kept_NV, layout.there.from_P, send_rows)

    def send(rows_X, sizes, arriving):
        """Returns what arrives, followed by zeros."""
        arrived = jnp.zeros((arriving, *rows_X.shape[1:]), rows_X.dtype)
        return all_to_all(rows_X, arrived, *sizes, axis_name=AXIS)

    def there(x_NX, route):
        held, layout = route
        return send(slots.place(x_NX, held), layout.there, rows)

    def back(y_RX, route):
        held, layout = route
        return slots.collect(send(y_RX, layout.back, send_rows), held)

    dropped = dropping.dropped_choices(visits, is_kept_NV)
    return Path(there, back, (held, layout), jnp.int32(0), dropped)


def gather(
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    cfg: ExchangeConfig,
    router: RouterConfig,
) -> Path:
    """Moves all tokens to all devices, whose capacity is always enough."""

    def there(x_NX, route):
        return collectives.all_gather(x_NX, AXIS, 0)

    def back(y_RX, route):
        return collectives.reduce_scatter(y_RX, AXIS, 0)

    return Path(there, back, (), jnp.int32(0), jnp.int32(0))


def _rank(visits: dropping.Visits, cfg: ExchangeConfig, peers: int) -> jax.Array:
    """Returns each visit's rank, by which it is dropped; by position if none can be."""
    order = "position" if cfg.capacity_factor is None else cfg.drop_order
    return dropping.DROP_ORDERS[order](visits, peers)


BACKENDS: dict[
    str, Callable[[jax.Array, jax.Array, ExchangeConfig, RouterConfig], Path]
] = {"padded": padded, "ragged": ragged_rows, "gather": gather}
