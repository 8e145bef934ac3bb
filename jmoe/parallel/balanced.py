"""The exchange by which every device computes as many rows as any other.

Whatever the router chose, `jmoe.balance.lending` decides which device computes which
choice: the expert's home, or one that borrows the expert for this microbatch. So a
device has E / P experts of its own and S that it borrows, and all devices together have
P * (E / P + S) *stations*, at which choices are computed. To those, rows travel as they
do to experts elsewhere (`jmoe.parallel.parts`), and weights travel to the borrowers
(`jmoe.parallel.loans`). The router, its gates and its bias don't notice.

Nothing is dropped, and no buffer is for the worst case: it holds what is expected and a
little more. What is left over goes in further *parts*, one after the other, as many as
there are; mostly none. The first part is computed as any exchange is. Of the others,
the forward and the backward pass are loops, the latter of which computes everything
again and adds to what the first part's backward pass yielded.

Shapes: N token of this device, D hidden, K choice of a token, P device of the `expert`
axis, S slot for a borrowed expert, E expert, R row that arrives here.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.balance import lending
from jmoe.config import ExchangeConfig, RouterConfig
from jmoe.ops import fp8, rows
from jmoe.parallel import collectives, loans, parts, reductions, travel
from jmoe.parallel.travel import AXIS, Experts, Group


class _Layout(NamedTuple):
    """Holds what stays the same for all parts of an exchange.

    share: of rows, what a device has at most if slots suffice. stations: of all devices
    together, of which each has `own` and `slots`.
    """

    experts: Experts
    wire: travel.Wire
    form: loans.Form
    share: int
    capacity: int
    stations: int
    own: int
    slots: int
    remat: bool


class _Chunk(NamedTuple):
    """Holds who goes where: integers alone."""

    station_NK: jax.Array
    trips: travel.Trips
    borrowed_PS: jax.Array


def num_slots(cfg: ExchangeConfig, router: RouterConfig, peers: int) -> int:
    """Returns S, how many experts a device can borrow.

    Raises:
      ValueError: more than other devices have.
    """
    own = router.num_experts // peers
    slots = min(4, own) if cfg.slots is None else cfg.slots
    if slots > router.num_experts - own:
        raise ValueError(
            f"model.moe.exchange.slots={slots} must be at most "
            f"{router.num_experts - own}, the number of experts that are other "
            f"devices' with num_experts={router.num_experts} on expert={peers}."
        )
    return slots


def exchange(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    gate_NK: jax.Array,
    experts: Experts,
    weights: Any,
    cfg: ExchangeConfig,
    router: RouterConfig,
    *,
    recipe: fp8.Recipe | None,
    remat: bool,
) -> tuple[jax.Array, Mapping[str, Any]]:
    """Returns what `jmoe.parallel.exchange` does, and what lending measures.

    Of a microbatch: device_max_vio and device_max_vio_lent, by how much the busiest
    device exceeds the mean without lending and with it; experts_lent, the loans;
    lent_PP, from which device (first) to which; bytes_lent, of their weights on the way
    to borrowers, once; rows_left_over, those by which devices still exceed the mean.

    A device's own experts are one group, and those that it borrows another: the first
    is computed while the others' weights are on their way.
    """
    peers = collectives.axis_size(AXIS)
    own = collectives.share(router.num_experts, AXIS, "num_experts")
    slots = num_slots(cfg, router, peers)
    group = collectives.axis_size("tensor")
    lending.check_rows(group * len(x_ND), router.top_k, peers)
    stations = dataclasses.replace(
        router,
        num_experts=peers * (own + slots),
        num_groups=1,
        groups_per_token=1,
    )
    plan, station_NK, metrics = _plan(expert_NK, cfg, router, slots)
    form = loans.in_dtype(x_ND.dtype)
    if recipe is not None:
        form = loans.in_fp8(recipe, x_ND.dtype)
    # Each device of a tensor group lends its part of an expert.
    size = jnp.float32(group * loans.bytes_of_expert(weights, form))
    metrics = {**metrics, "bytes_lent": metrics["experts_lent"] * size}
    tokens = len(x_ND) // cfg.chunks
    share = math.ceil(tokens * router.top_k * (1 + cfg.lend_above))
    layout = _Layout(
        experts,
        travel.WIRES[cfg.dispatch_dtype],
        form,
        share,
        parts.capacity(cfg.capacity_factor, tokens, router, share),
        stations.num_experts,
        own,
        slots,
        remat,
    )
    done = []
    chunks = (jnp.split(part, cfg.chunks) for part in (x_ND, station_NK, gate_NK))
    for x, station, gate in zip(*chunks, strict=True):
        trips = travel.plan(travel.count, station, gate, stations, "position")
        chunk = _Chunk(station, trips, plan.borrowed_PS)
        done.append(_exchange_chunk(layout, x, gate, weights, chunk))
    return jnp.concatenate(done), metrics


def _plan(
    expert_NK: jax.Array, cfg: ExchangeConfig, router: RouterConfig, slots: int
) -> tuple[lending.LendingPlan, jax.Array, Mapping[str, Any]]:
    """Returns loans, the station of each choice, and what is reported of them.

    Devices of a `tensor` group compute each other's tokens: they are one source, whose
    choices are in the order of its devices.
    """
    peers, group = collectives.axis_size(AXIS), collectives.axis_size("tensor")
    load_E = rows.count(expert_NK, router.num_experts)
    load_PGE = collectives.all_gather(load_E[None], (AXIS, "tensor"), 0)
    load_PGE = load_PGE.reshape(peers, group, -1)
    load_PE, me = load_PGE.sum(1), collectives.axis_index(AXIS)
    plan = lending.plan(load_PE, slots, cfg.lend_above, cfg.node_size)
    is_earlier_G = jnp.arange(group) < collectives.axis_index("tensor")
    before_E = jnp.where(is_earlier_G[:, None], load_PGE[me], 0).sum(0)
    computer_NK, group_NK = lending.assign(plan, load_PE, expert_NK, me, before_E)
    here = router.num_experts // peers + slots
    station_NK = jnp.where(
        computer_NK < peers, computer_NK * here + group_NK, peers * here
    )
    return plan, station_NK, _metrics(load_PE, plan)


def _metrics(load_PE: jax.Array, plan: lending.LendingPlan) -> Mapping[str, Any]:
    """Returns maxima, and sums of which the first device of the axes has all."""
    found = lending.measure(load_PE, plan)
    is_first = collectives.axis_index((AXIS, "tensor")) == 0
    return {
        "device_max_vio": reductions.Max(found.max_violation_before),
        "device_max_vio_lent": reductions.Max(found.max_violation_after),
        "experts_lent": jnp.where(is_first, found.lent, 0),
        "lent_PP": jnp.where(is_first, lending.loans_between(plan), 0),
        "rows_left_over": jnp.where(is_first, found.left_over, 0),
    }


def _exchange_chunk(
    layout: _Layout, x_ND: jax.Array, gate_NK: jax.Array, weights: Any, chunk: _Chunk
) -> jax.Array:
    # What a tensor group computes, it computes together, so often as one needs to.
    num_parts = collectives.pmax(parts.count(chunk.trips, layout.capacity), "tensor")
    given: Any = _with_gradients_of_later_parts(
        layout, num_parts, x_ND, gate_NK, weights, chunk
    )
    x_ND, gate_NK, weights, nothing_ND = given
    y_ND, lent = _exchange_part(layout, 0, x_ND, gate_NK, weights, chunk)
    tokens, held = lax.stop_gradient(((x_ND, gate_NK), (weights, lent)))

    def add(nth, y_ND):
        x_ND, gate_NK = _only_in(nth, tokens)
        path, arrived = _bring(layout, nth, x_ND, gate_NK, chunk)
        y_RD = _compute(layout, arrived, *held)
        return y_ND + path.carry_back(y_RD).astype(jnp.float32)

    later_ND = lax.fori_loop(1, num_parts, add, jnp.zeros(x_ND.shape, jnp.float32))
    later_ND = lax.stop_gradient(later_ND).astype(y_ND.dtype)
    return y_ND + nothing_ND + later_ND


def _exchange_part(
    layout: _Layout,
    nth: jax.Array | int,
    x_ND: jax.Array,
    gate_NK: jax.Array,
    weights: Any,
    chunk: _Chunk,
) -> tuple[jax.Array, Any]:
    """Returns the results of one part's visits, and borrowed weights."""

    def compute(arrived: travel.Arrived, weights: Any) -> tuple[jax.Array, Any]:
        both: Any = [loans.lend(w, chunk.borrowed_PS, layout.form) for w in weights]
        own, lent = (tuple(pair[i] for pair in both) for i in range(2))
        return _compute(layout, arrived, own, lent), lent

    path, arrived = _bring(layout, nth, x_ND, gate_NK, chunk)
    if layout.remat:  # of products, nothing is computed again: only what they are given
        compute = jax.checkpoint(compute)
    y_RD, lent = compute(arrived, weights)
    return path.carry_back(y_RD), lent


def _bring(
    layout: _Layout,
    nth: jax.Array | int,
    x_ND: jax.Array,
    gate_NK: jax.Array,
    chunk: _Chunk,
) -> tuple[travel.Path, travel.Arrived]:
    path = parts.path(chunk.trips, layout.capacity, nth)
    tokens = x_ND, chunk.station_NK, gate_NK
    return path, travel.bring(path, layout.wire, *tokens, layout.stations)


def _compute(
    layout: _Layout, arrived: travel.Arrived, own: Any, lent: Any
) -> jax.Array:
    """Returns what a device computes: mostly at home, and a quarter of it at most not.

    That is what there are arrays for; further rows are computed after these.
    """
    choices = arrived.choices_of(0, layout.own)
    at_home = Group(*choices, own, rows=layout.share, is_bound=True)
    choices = arrived.choices_of(layout.own, layout.slots)
    borrowed = Group(*choices, lent, rows=layout.share // 4, is_bound=True)
    return layout.experts(arrived.x_RD, [at_home, borrowed])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradients_of_later_parts(layout, num_parts, x_ND, gate_NK, weights, chunk):
    """Returns its arguments, and zeros to add to the results of the first part.

    What comes back through these is the results' gradient, from which those of the
    later parts are computed, and added to the arguments' others. So there is one array
    for the weights' gradient, and it isn't touched if there are no later parts.
    """
    del num_parts, chunk
    return x_ND, gate_NK, weights, jnp.zeros_like(x_ND)


def _later_parts_forward(layout, num_parts, x_ND, gate_NK, weights, chunk):
    given = num_parts, x_ND, gate_NK, weights, chunk
    return _with_gradients_of_later_parts(layout, *given), given


def _later_parts_backward(layout, given, gradients):
    num_parts, x_ND, gate_NK, weights, chunk = given
    d_x_ND, d_gate_NK, d_weights, dy_ND = gradients
    inputs = {"x_ND": x_ND, "gate_NK": gate_NK, "weights": weights}

    def add_gradients(total: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns these inputs' gradients with those of the later parts."""

        def add(nth, total):
            given, where, d_y = _only_in(nth, (inputs, chunk, dy_ND))

            def part(at):
                return _exchange_part(layout, nth, **(given | at), chunk=where)[0]

            _, pull = jax.vjp(part, {name: given[name] for name in total})
            return jax.tree.map(jnp.add, total, *pull(d_y))

        return lax.fori_loop(1, num_parts, add, total)

    # Two loops, as a pipeline puts off the gradients of weights.
    d_tokens = add_gradients({"x_ND": d_x_ND, "gate_NK": d_gate_NK})
    (d_weights,) = add_gradients({"weights": d_weights}).values()
    return None, d_tokens["x_ND"], d_tokens["gate_NK"], d_weights, None


def _only_in(nth: jax.Array, values: Any) -> Any:
    """Returns the values, of which nothing is computed but within this round of a loop.

    XLA computes before a loop what is the same in all its rounds, be there none at all:
    weights would be lent, and tokens travel, in vain.
    """
    return lax.optimization_barrier((nth, values))[1]


_with_gradients_of_later_parts.defvjp(_later_parts_forward, _later_parts_backward)
