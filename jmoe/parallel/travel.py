"""Rows of tokens on their way to the devices of their experts, and of results back.

Shapes: N token of this device, D hidden, K choice of a token, P device of the `expert`
axis (a *peer*), V most visits of a token, C slots a peer, R row that arrives here, X of
whatever rows have; a PP array is of what its row's device sends to its column's.

Transports differ in how rows move:

- `padded`: a dense all-to-all of C slots for each peer.
- `ragged`: as many rows as there are. Only GPUs have this all-to-all.
- `gather`: every token to every device; to measure the others by.

Visits that are more than buffers hold are dropped, or moved in later *parts*
(`parallel.parts`).

All of them move rows by a pair of functions that are each other's transposes: `there`
carries tokens forward and the gradients of results backward, `back` the reverse. Tokens
may travel in FP8, gradients and results never do (DeepSeek-V3, arXiv 2412.19437,
section 3.3.3).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.balance import dropping
from jmoe.config import RouterConfig
from jmoe.ops import fp8
from jmoe.parallel import collectives, ragged, slots

AXIS = "expert"


class Group(NamedTuple):
    """Choices of a group of experts that are here, and these experts' weights.

    expert_RK: int32; the number after the last expert is "nobody", and contributes
    nothing, neither to a result nor to a gradient. The contract of `jmoe.ops.grouped`.
    rows, is_bound: about how many choices of a device's tokens aren't nobody's, and
    whether more are rare.
    """

    expert_RK: jax.Array
    gate_RK: jax.Array
    weights: Any
    rows: int
    is_bound: bool = False


Experts = Callable[[jax.Array, Sequence[Group]], jax.Array]
"""`experts(x_RD, groups) -> y_RD`, the sum of all groups' experts."""


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
    """How one part's rows move; `there` and `back` are each other's transposes.

    there: from [N, X] to [R, X], where rows that nothing arrives at are zeros.
    back: from [R, X] to [N, X], the sum of a token's rows.
    route: arrays that they need. is_kept_NV: which visits are in this part.
    """

    there: Move
    back: Move
    route: Any
    is_kept_NV: jax.Array

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


class Trips(NamedTuple):
    """Holds who visits whom, in which order; `count_PP` where a transport needs it."""

    visits: dropping.Visits
    rank_NV: jax.Array
    count_PP: Any = None


class Transport(NamedTuple):
    """One way to move rows.

    capacity(factor, tokens, router, peers) -> int: visits that fit into buffers: those
      that a device pays to one peer, or that it receives, of `tokens` of each.
    plan(visits, rank_NV) -> trips
    path(trips, capacity) -> Path: a peer that receives more than it can hold divides
      its room between those that send.
    where: in which direction capacity can be too small, "sending" or "receiving".
    """

    capacity: Callable[[float | None, int, RouterConfig, int], int]
    plan: Callable[[dropping.Visits, jax.Array], Trips]
    path: Callable[..., Path]
    where: str


def _padded_path(trips: Trips, capacity: int) -> Path:
    """Moves C slots to each peer, of which those without a visit travel empty."""
    peers, (visits, rank_NV, _) = collectives.axis_size(AXIS), trips
    is_kept_NV = slots.keep(visits, rank_NV, jnp.full(peers, capacity))
    first_P = jnp.arange(peers) * capacity
    route = slots.assign(visits, rank_NV, is_kept_NV, first_P, peers * capacity)

    def there(x_NX, route):
        x_PCX = slots.place(x_NX, route.token_R).reshape(peers, capacity, -1)
        return collectives.all_to_all(x_PCX, AXIS, 0, 0).reshape(peers * capacity, -1)

    def back(y_RX, route):
        y_PCX = collectives.all_to_all(y_RX.reshape(peers, capacity, -1), AXIS, 0, 0)
        return slots.collect(y_PCX.reshape(peers * capacity, -1), route)

    return Path(there, back, route, is_kept_NV)


PADDED = Transport(dropping.send_capacity, Trips, _padded_path, where="sending")


def count(visits: dropping.Visits, rank_NV: jax.Array) -> Trips:
    count_P = dropping.count_visits(visits, collectives.axis_size(AXIS))
    return Trips(visits, rank_NV, collectives.all_gather(count_P[None], AXIS, 0))


def _ragged_path(
    all_to_all: Callable[..., jax.Array],
    trips: Trips,
    rows: int,
    nth: jax.Array | int | None = None,
) -> Path:
    """Moves as many rows as there are visits, of which a peer may not take all.

    Or that part of all of them, if there is an `nth`.
    """
    me = collectives.axis_index(AXIS)
    if nth is None:
        size_PP, rank_NV = ragged.shared(trips.count_PP, rows), trips.rank_NV
    else:
        size_PP, rank_NV = window(trips, rows, nth)
    layout = ragged.plan(size_PP, me)
    is_kept_NV = slots.keep(trips.visits, rank_NV, layout.there.send_P)
    send_rows = trips.visits.peer_NV.size
    held = slots.assign(
        trips.visits, rank_NV, is_kept_NV, layout.there.from_P, send_rows
    )

    # Zeros that are made late hold no memory before. Where rows travel in one part, XLA
    # then would hide less of their way, as with `tensor`.
    make_zeros = ragged.zeros if nth is None else ragged.late_zeros

    def send(rows_X, sizes, arriving):
        """Returns what arrives, followed by zeros."""
        arrived = make_zeros(arriving, rows_X)
        return all_to_all(rows_X, arrived, *sizes, axis_name=AXIS)

    def there(x_NX, route):
        held, layout = route
        return send(slots.place(x_NX, held.token_R), layout.there, rows)

    def back(y_RX, route):
        held, layout = route
        return slots.collect(send(y_RX, layout.back, send_rows), held)

    return Path(there, back, (held, layout), is_kept_NV)


def window(
    trips: Trips, rows: int, nth: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Returns how many visits are in that part, [P, P], and ranks of this device's."""
    size_PP, skipped_PP = ragged.window(trips.count_PP, rows, nth)
    skipped_P = jnp.append(skipped_PP[collectives.axis_index(AXIS)], 0)
    return size_PP, trips.rank_NV - skipped_P[trips.visits.peer_NV]


def ragged_rows(all_to_all: Callable[..., jax.Array]) -> Transport:
    path = functools.partial(_ragged_path, all_to_all)
    return Transport(dropping.receive_capacity, count, path, where="receiving")


def _gather_path(trips: Trips, capacity: int) -> Path:
    """Moves all tokens to all devices, whose capacity is always enough."""
    del capacity

    def there(x_NX, route):
        return collectives.all_gather(x_NX, AXIS, 0)

    def back(y_RX, route):
        return collectives.reduce_scatter(y_RX, AXIS, 0)

    return Path(there, back, (), jnp.ones(trips.visits.peer_NV.shape, bool))


GATHER = Transport(
    lambda factor, tokens, router, peers: tokens,
    Trips,
    _gather_path,
    where="sending",
)

TRANSPORTS: dict[str, Transport] = {
    "padded": PADDED,
    "ragged": ragged_rows(jax.lax.ragged_all_to_all),
    "gather": GATHER,
}


def plan(
    trips_of: Callable[[dropping.Visits, jax.Array], Trips],
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    router: RouterConfig,
    order: str,
) -> Trips:
    """Returns the trips that tokens need for their choices.

    Args:
      trips_of: a transport's `plan`.
      expert_NK: int32 in [0, E]; E is nobody.
      order: of `dropping.DROP_ORDERS`; the last of them go last.
    """
    peers = collectives.axis_size(AXIS)
    visits = dropping.find_visits(expert_NK, gate_NK, router, peers)
    return trips_of(visits, dropping.DROP_ORDERS[order](visits, peers))


class Arrived(NamedTuple):
    """What comes to this device: tokens, and their choices with gates.

    local_RK: int32, a choice's number less that of this device's first expert. So it is
    out of range where it is another device's.
    """

    x_RD: jax.Array
    local_RK: jax.Array
    gate_RK: jax.Array

    def choices_of(self, first: int, count: int) -> tuple[jax.Array, jax.Array]:
        """Returns choices of so many experts, 0 to `count`; others are nobody's.

        Where there are fewer experts than a token has choices, a column for each of
        them holds as much, and the grouped matmul has fewer rows to sort and to make
        room for.
        """
        expert_RK, gate_RK = self.local_RK - first, self.gate_RK
        if count >= expert_RK.shape[1]:
            is_here_RK = (expert_RK >= 0) & (expert_RK < count)
            return jnp.where(is_here_RK, expert_RK, count), gate_RK
        expert_E = jnp.arange(count, dtype=jnp.int32)
        is_chosen_REK = expert_RK[:, None] == expert_E[:, None]
        expert_RE = jnp.where(is_chosen_REK.any(-1), expert_E, count)
        return expert_RE, jnp.where(is_chosen_REK, gate_RK[:, None], 0).sum(-1)


def bring(
    path: Path,
    wire: Wire,
    x_ND: jax.Array,
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    num_experts: int,
) -> Arrived:
    """Returns what arrives when tokens take this path, with their choices."""
    own = num_experts // collectives.axis_size(AXIS)
    x_RD = path.carry(x_ND, wire)
    # 0 is nobody on the way: slots that no token fills are zeros.
    number_NK = jnp.where(expert_NK < num_experts, expert_NK + 1, 0)
    choices_NX = jnp.concatenate([number_NK.astype(jnp.float32), gate_NK], axis=1)
    number_RK, gate_RK = jnp.split(path.carry(choices_NX, AS_IT_IS), 2, axis=1)
    local_RK = number_RK.astype(jnp.int32) - 1 - collectives.axis_index(AXIS) * own
    return Arrived(x_RD, local_RK, gate_RK)
