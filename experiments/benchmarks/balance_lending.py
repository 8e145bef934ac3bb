"""How evenly loans share out uneven routings, and how long a CPU plans them."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.balance_routings import (
    DRAWS,
    KINDS,
    SHAPES,
    TOKENS,
    Routing,
    Shape,
    routings,
)
from experiments.benchmarks.report import Figure
from jmoe.balance.lending import plan

SLOTS: dict[str, Callable[[Shape], int]] = {
    "1": lambda shape: 1,
    "2": lambda shape: 2,
    "4": lambda shape: 4,
    "experts of a device": lambda shape: shape.hosted,
}
PLANNED = 100  # plans of one measurement of time
V3_DEVICES = (8, 16, 64)
V3_EXPERTS = 256

_plan = jax.jit(plan, static_argnums=(1, 2, 3))


class Lent(NamedTuple):
    """What became of one routing.

    before, after: how far the busiest device is above the mean, relative to it. spread:
    the busiest device's rows but the idlest's. loans: of each device. lost: rows that
    no device computes.
    """

    routing: Routing
    before: float
    after: float
    spread: int
    loans: Sequence[int]
    lost: int


def lending(rounds: int, say: Callable[[str], None]) -> Part:
    """Plans loans for all routings, with few slots and with many."""
    del rounds  # it is exact
    given = list(routings())
    say(f"{len(given)} routings: loans are planned")
    results = {
        name: [lend(routing, slots(routing.shape)) for routing in given]
        for name, slots in SLOTS.items()
    }
    return Part(
        figures=list(figures(results)),
        settings={
            "shapes": [shape._asdict() for shape in SHAPES],
            "kinds": list(KINDS),
            "draws": DRAWS,
            "tokens_per_device": TOKENS,
        },
        samples={name: summary(results[name]) for name in results},
    )


def lend(routing: Routing, slots: int) -> Lent:
    """Plans loans for a routing, with so many slots for each device."""
    devices, experts, _ = routing.shape
    borrowed_PS, rows_EP = map(np.asarray, _plan(routing.load_PE, slots))
    before_P = routing.load_PE.sum(0).reshape(devices, -1).sum(1)
    after_P = rows_EP.sum(0)
    return Lent(
        routing=routing,
        before=float(before_P.max() / before_P.mean() - 1),
        after=float(after_P.max() / before_P.mean() - 1),
        spread=int(after_P.max() - after_P.min()),
        loans=(borrowed_PS < experts).sum(1).tolist(),
        lost=int(np.abs(rows_EP.sum(1) - routing.load_PE.sum(0)).sum()),
    )


def figures(results: Mapping[str, Sequence[Lent]]) -> Iterator[Figure]:
    """Yields what is asked of all routings together."""
    before = [lent.before for lent in next(iter(results.values()))]
    yield Figure(
        name="busiest device above the mean, without loans, mean of routings",
        value=100 * statistics.mean(before),
        unit="%",
        definition="rows of the busiest device over the mean, less 1",
    )
    for slots, all_lent in results.items():
        after = [100 * lent.after for lent in all_lent]
        name = f"busiest device above the mean, slots: {slots}"
        definition = "as without loans; of all routings"
        at_most = 1.0 if slots == "4" else None
        yield Figure(
            name=f"{name}, worst routing",
            value=max(after),
            unit="%",
            definition=definition,
            at_most=at_most,
        )
        yield Figure(
            name=f"{name}, mean of routings",
            value=statistics.mean(after),
            unit="%",
            definition=definition,
        )
        yield Figure(
            name=f"more than 1% above the mean, slots: {slots}",
            value=sum(value > 1 for value in after),
            unit="routings",
            definition=f"of {len(after)}",
        )
        loans = [count for lent in all_lent for count in lent.loans]
        yield Figure(
            name=f"experts that a device borrows, slots: {slots}, mean / device",
            value=statistics.mean(loans),
            unit="",
            definition="over all devices and routings",
        )
    exact = results["experts of a device"]
    yield Figure(
        name="rows of the busiest device above the idlest's, worst routing",
        value=max(lent.spread for lent in exact),
        unit="rows",
        definition="with as many slots as a device has experts",
        at_most=1,
    )
    yield Figure(
        name="experts that a device borrows, most",
        value=max(max(lent.loans) for lent in exact),
        unit="",
        definition="with as many slots as a device has experts",
    )
    yield Figure(
        name="rows that nobody computes",
        value=sum(lent.lost for all_lent in results.values() for lent in all_lent),
        unit="rows",
        definition="over all routings and slots: what the planned rows of an expert "
        "are more or less than its load",
        at_most=0,
    )


def summary(all_lent: Iterable[Lent]) -> dict[str, dict[str, float]]:
    """Returns the worst and the mean of each shape and kind of routing."""
    found: dict[str, list[Lent]] = {}
    for lent in all_lent:
        devices, experts, _ = lent.routing.shape
        name = f"{experts} experts on {devices} devices, {lent.routing.kind}"
        found.setdefault(name, []).append(lent)
    return {
        name: {
            "before": statistics.mean(lent.before for lent in group),
            "after": statistics.mean(lent.after for lent in group),
            "worst_after": max(lent.after for lent in group),
            "loans": statistics.mean(x for lent in group for x in lent.loans),
            "most_loans": max(x for lent in group for x in lent.loans),
        }
        for name, group in found.items()
    }


def planning_time(rounds: int, say: Callable[[str], None]) -> Part:
    """Measures how long a CPU plans at DeepSeek-V3's shape."""
    say("times of a plan on this CPU")
    seconds = {str(devices): _seconds(devices, rounds) for devices in V3_DEVICES}
    return Part(
        figures=[
            Figure(
                name=f"a plan on the CPU, {V3_EXPERTS} experts on {devices} devices",
                value=1e6 * statistics.median(times),
                unit="us",
                definition=f"4 slots; median over rounds of {PLANNED} plans",
            )
            for devices, times in seconds.items()
        ],
        settings={"experts": V3_EXPERTS, "slots": 4, "rounds": rounds},
        samples={"seconds": seconds},
    )


def _seconds(devices: int, rounds: int) -> list[float]:
    """Returns what one of many plans took in each round."""
    rng = np.random.default_rng(0)
    load_PE = jnp.asarray(rng.integers(0, 1000, (devices, V3_EXPERTS)), jnp.int32)
    run = functools.partial(_plan, load_PE, 4)
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(PLANNED):
            jax.block_until_ready(run())
        times.append((time.perf_counter() - start) / PLANNED)
    return times
