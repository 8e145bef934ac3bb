"""How busy the busiest of 16 devices is, over a training run and while serving.

One part of the suite `balance`. Loads are recorded (`balance_runs`): those of a run's
steps from random weights to its end, and those of the model that it leaves, which reads
text of one domain. Four ways have the same loads:

    static      experts stay where they are, the first on the first device
    placement   every few steps, experts go where a forecast says, few of them
    lending     they stay, and are lent for a step
    both        they go where the forecast says, and are lent from there

Training has one home for each expert; serving has room for copies: one more expert on
each device, which `placement` and `both` use.

Shapes: N step, L layer, E expert, R replica (and so slot), W window of steps, P device.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import balance_cost, balance_runs
from experiments.benchmarks.balance_cost import DEVICES, NODE, PHASES, Uneven
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.report import Figure
from jmoe.balance import lending
from jmoe.balance.forecast import forecast
from jmoe.balance.placement import Placement, moves, place
from jmoe.config import ExchangeConfig, ModelConfig

WINDOW = 10  # steps between placements, and of what forecasts are made of
WINDOWS = 24  # of a forecast, at most
SLOTS = 4  # of a device, for borrowed experts
BLOCK = 5  # steps whose mean the picture shows
MODELS = ("v3", "v2_lite")
WAYS = ("static", "placement", "lending", "both")


class Shared(NamedTuple):
    """How steps were shared out.

    uneven: what a step's time follows from. loans: experts that a device borrows, mean
    over devices, [N, L]. moved: share of the slots that a new placement changes, mean.
    """

    uneven: Uneven
    loans: np.ndarray
    moved: float


def busiest(rounds: int, say: Callable[[str], None]) -> Part:
    """Shares out recorded loads in four ways."""
    del rounds  # it is exact, but for what the training run makes of its seed
    say("a training run is recorded, if it isn't kept: a minute or two")
    run = balance_runs.recorded()
    loads = {"training": run.load_NLE, **run.served}
    say("its steps are shared out in four ways")
    shared = {
        name: four_ways(load_NLE, copies=name != "training")
        for name, load_NLE in loads.items()
    }
    return Part(
        figures=[*balance_figures(shared), *time_figures(shared)],
        settings={
            "model": balance_runs.SHAPE,
            "devices": DEVICES,
            "tokens_a_step": balance_runs.tokens_a_step(),
            "window": WINDOW,
            "slots": SLOTS,
        },
        samples={
            name: {way: sample(ways[way]) for way in WAYS}
            for name, ways in shared.items()
        },
    )


def four_ways(load_NLE: np.ndarray, *, copies: bool) -> dict[str, Shared]:
    """Returns each of `WAYS` of sharing out these loads.

    Args:
      copies: whether placed experts may use one more slot of each device.
    """
    num_experts = load_NLE.shape[-1]
    replicas = num_experts + DEVICES * copies
    home_NLR = np.broadcast_to(np.arange(num_experts), load_NLE.shape)
    placed_NLR, moved = place_over_time(load_NLE, replicas)
    return {
        "static": shared(load_NLE, home_NLR, stay),
        "placement": shared(load_NLE, placed_NLR, stay, moved),
        "lending": shared(load_NLE, home_NLR, lend),
        "both": shared(load_NLE, placed_NLR, lend, moved),
    }


def place_over_time(load_NLE: np.ndarray, replicas: int) -> tuple[np.ndarray, float]:
    """Returns the expert in each slot at each step, [N, L, R], and what moves.

    A window's steps have the placement that is made of those before it. In the first,
    nothing is known.
    """
    starts = range(0, len(load_NLE), WINDOW)
    load_WLE = np.stack([load_NLE[n : n + WINDOW].sum(0) for n in starts])
    sizes = replicas, 1, 1, DEVICES
    placed: Placement = place(np.ones(load_WLE.shape[1:]), *sizes)
    slots, moved = [placed.physical_to_logical], []
    for window in range(1, len(load_WLE)):
        expected_LE = forecast(load_WLE[max(0, window - WINDOWS) : window])
        new = place(expected_LE, *sizes, placed)
        moved.append(moves(placed, new).mean())
        slots.append(new.physical_to_logical)
        placed = new
    slot_NLR = np.repeat(slots, WINDOW, axis=0)[: len(load_NLE)]
    return slot_NLR, float(np.mean(moved))


def load_of_slots(load_NLE: np.ndarray, slot_NLR: np.ndarray) -> np.ndarray:
    """Returns what each slot has to do, int [N, L, R]: replicas share evenly."""
    same_NLRR = slot_NLR[..., :, None] == slot_NLR[..., None, :]
    count_NLR = same_NLRR.sum(-1)
    rank_NLR = np.tril(same_NLRR, -1).sum(-1)
    load_NLR = np.take_along_axis(load_NLE, slot_NLR, -1)
    return load_NLR // count_NLR + (rank_NLR < load_NLR % count_NLR)


Sharing = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""`share(load_NLR)`: rows of devices [N, L, P], loans between any two [N, L, P, P]."""


def shared(
    load_NLE: np.ndarray, slot_NLR: np.ndarray, share: Sharing, moved: float = 0.0
) -> Shared:
    """Returns what becomes of loads whose experts are in these slots."""
    load_NLR = jnp.asarray(load_of_slots(load_NLE, slot_NLR), jnp.int32)
    rows_NLP, loans_NLPP = map(np.asarray, share(load_NLR))
    node_P = np.arange(DEVICES) // NODE
    is_near_PP = node_P[:, None] == node_P
    near, far = (
        np.maximum(loans.sum(-1), loans.sum(-2)).max(-1)
        for loans in (loans_NLPP * is_near_PP, loans_NLPP * ~is_near_PP)
    )
    copies = (slot_NLR.shape[-1] - load_NLE.shape[-1]) // DEVICES
    uneven = Uneven(rows_NLP.max(-1) / rows_NLP.mean(-1), near, far, copies)
    return Shared(uneven, loans_NLPP.sum((-1, -2)) / DEVICES, moved)


def stay(load_NLR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every device computes its own experts."""
    rows_NLP = load_NLR.reshape(*load_NLR.shape[:2], DEVICES, -1).sum(-1)
    return rows_NLP, jnp.zeros((*rows_NLP.shape, DEVICES), jnp.int32)


@jax.jit
def lend(load_NLR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Devices lend experts, as the exchange `balanced` does by default."""

    def lend_layer(load_R: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Where rows come from changes nothing in who lends to whom.
        load_PR = jnp.zeros((DEVICES, load_R.size), jnp.int32).at[0].set(load_R)
        planned = lending.plan(load_PR, SLOTS, ExchangeConfig().lend_above, NODE)
        return planned.rows_EP.sum(0), lending.loans_between(planned)

    return jax.vmap(jax.vmap(lend_layer))(load_NLR)


def sample(way: Shared) -> dict[str, Any]:
    """Returns what JSON has: rows over time, as means of `BLOCK` steps and layers."""
    busiest_NL = way.uneven.busiest
    whole = len(busiest_NL) // BLOCK * BLOCK
    block_B = busiest_NL[:whole].reshape(-1, BLOCK * busiest_NL.shape[1]).mean(1)
    return {
        "busiest": block_B.tolist(),
        "loans": float(way.loans.mean()),
        "most_loans": int((way.uneven.near + way.uneven.far).max()),
        "moved": way.moved,
    }


def balance_figures(found: Mapping[str, Mapping[str, Shared]]) -> Iterator[Figure]:
    """Yields how busy the busiest device is, how much is lent and moved."""
    for trace, ways in found.items():
        for name, way in ways.items():
            busiest_NL = way.uneven.busiest
            for what, value in (
                ("mean", busiest_NL.mean()),
                ("99%", np.percentile(busiest_NL, 99)),
                ("most", busiest_NL.max()),
            ):
                yield Figure(
                    name=f"busiest device over the mean, {trace}, {name}: {what}",
                    value=float(value),
                    unit="x",
                    definition=f"rows, of {busiest_NL.size} steps' layers",
                )
        for name in ("lending", "both"):
            yield Figure(
                name=f"experts that a device borrows, {trace}, {name}",
                value=float(ways[name].loans.mean()),
                unit="",
                definition="mean over devices, layers and steps",
            )
        yield Figure(
            name=f"slots that a placement changes, {trace}",
            value=100 * ways["placement"].moved,
            unit="%",
            definition=f"mean over placements, one in {WINDOW} steps",
        )


def time_figures(found: Mapping[str, Mapping[str, Shared]]) -> Iterator[Figure]:
    """Yields a step's time on 16 H20s, by the floor of `balance_cost`."""
    served = balance_runs.SERVED[0]
    for model in MODELS:
        cfg = ModelConfig.preset(model)
        for phase, cost in PHASES.items():
            ways = found["training" if phase == "training" else served]
            for name, way in ways.items():
                seconds_N = balance_cost.step_seconds(cfg, cost, way.uneven)
                limit = balance_cost.bound(cfg, cost, way.uneven)
                yield Figure(
                    name=f"{model} on 16 H20s, {phase}, {name}",
                    value=1e3 * float(seconds_N.mean()),
                    unit="ms",
                    definition=f"a step's floor with {cost.tokens} tokens a device, "
                    f"mean over the recorded steps; experts are bound by {limit}",
                )
