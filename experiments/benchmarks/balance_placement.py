"""How evenly experts are placed, how much moves, and how long planning takes.

One part of the suite `balance`. Balance is the
load of the busiest device relative to the mean, averaged over layers: 1 is even. Beside
ours stand DeepSeek's rule (`eplb`) and a placement that knows nothing of the loads.

Dimensions: T windows of time, L layers, E experts.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import balance_runs, eplb
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.report import Figure
from jmoe.balance.forecast import forecast
from jmoe.balance.placement import Placement, device_load, moves, place

# From the README of DeepSeek's EPLB.
EXAMPLE_LE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
LAYERS, EXPERTS = 58, 256  # DeepSeek-V3's
DRIFT = 0.1  # each load is multiplied by exp(0.1 times a normal number)
TOLERANCE = 1.05
WINDOWS, TOKENS = 24, 4096  # of the forecasts, and what a window has of them
WINDOW = 10  # steps of a record, of which experts are placed by the first


class Sizes(NamedTuple):
    """What `place` takes besides the loads, in its order."""

    num_replicas: int
    num_groups: int
    num_nodes: int
    num_devices: int


ON_NODES = Sizes(288, 8, 4, 32)  # DeepSeek-V3's prefilling: a node's experts stay there
ANYWHERE = Sizes(320, 1, 1, 64)
SMALL = Sizes(80, 1, 1, 16)
TIMED = (Sizes(320, 1, 1, 320), Sizes(640, 1, 1, 320))


def placement(rounds: int, say: Callable[[str], None]) -> Part:
    """Places experts by loads that are drawn, then by others that drifted from them."""
    del rounds  # it is exact, but for the seconds
    say("a training run is recorded, if it isn't kept: a minute or two")
    run = balance_runs.recorded()
    say(f"experts are placed, {LAYERS} layers of {EXPERTS}")
    found = measure({"training": run.load_NLE, **run.served})
    settings = {"drift": DRIFT, "tolerance": TOLERANCE, "layers": LAYERS}
    return Part(figures=list(figures(found)), settings=settings, samples=found)


def figures(found: dict[str, Any]) -> Iterator[Figure]:
    """Yields what `measure` found and the project asks for."""
    for name, case in found["balance"].items():
        yield Figure(
            name=f"busiest device by ours over EPLB's, {name}",
            value=1 + case["most_above_eplb"],
            unit="x",
            definition="the largest ratio of all layers; both run here",
            at_most=1 + 1e-9,
        )
    for name, case in found["drift"].items():
        yield Figure(
            name=f"moves after a drift over those from scratch, {name}",
            value=case["moves_of_those_from_scratch"],
            unit="x",
            definition=f"loads times exp({DRIFT} times a normal number); the busiest "
            f"device then has {TOLERANCE} times what it has from scratch, at most",
            at_most=0.3,
        )
    for name, ways in found["recorded"].items():
        for way in ("eplb", "ours"):
            yield Figure(
                name=f"busiest device, placed by what came before, {name}, {way}",
                value=ways[way]["balance"],
                unit="x",
                definition="over the mean, averaged over windows of time and layers",
            )
            yield Figure(
                name=f"moves from window to window, {name}, {way}",
                value=100 * ways[way]["moves"],
                unit="%",
                definition="of all slots, on average",
            )
    for name, case in found["seconds"].items():
        yield Figure(
            name=f"time to place {LAYERS} layers of {EXPERTS} experts, {name}",
            value=max(case.values()),
            unit="s",
            definition="of a processor; the slower of zipf and uniform loads, from "
            "scratch and from the previous placement",
            at_most=2.0,
        )


def measure(recorded: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns all figures, as JSON has them.

    Args:
      recorded: loads of runs and servers, [N, L, E] in the order of time.
    """
    rng = np.random.default_rng(0)
    uniform_LE = rng.random((LAYERS, EXPERTS))
    zipf_LE = _zipf(rng)
    cases = {
        "example": (EXAMPLE_LE, Sizes(16, 4, 2, 8)),
        "uniform, on nodes": (uniform_LE, ON_NODES),
        "zipf, on nodes": (zipf_LE, ON_NODES),
        "uniform, anywhere": (uniform_LE, ANYWHERE),
        "zipf, anywhere": (zipf_LE, ANYWHERE),
    }
    for name, load_NLE in recorded.items():
        cases[f"recorded, {name}"] = load_NLE[:WINDOW].sum(0), SMALL
    return {
        "balance": {name: balance_of(*case) for name, case in cases.items()},
        "drift": {name: after_drift(*case) for name, case in cases.items()},
        "forecast": forecasts(),
        "recorded": {name: over_time(recorded[name]) for name in recorded},
        "seconds": seconds(zipf_LE, uniform_LE),
    }


def balance_of(load_LE: np.ndarray, sizes: Sizes) -> dict[str, float]:
    """Returns the balance by each way to place, and where ours is best and worst."""
    rule = [eplb.rule(load_E, *sizes) for load_E in load_LE.tolist()]
    ours_L = _balance_L(load_LE, place(load_LE, *sizes).physical_to_logical, sizes)
    rule_L = _balance_L(load_LE, np.array(rule), sizes)
    unaware = place(np.ones(load_LE.shape), *sizes).physical_to_logical
    return {
        "unaware": float(_balance_L(load_LE, unaware, sizes).mean()),
        "eplb": float(rule_L.mean()),
        "ours": float(ours_L.mean()),
        "most_above_eplb": float((ours_L / rule_L).max() - 1),
    }


def after_drift(load_LE: np.ndarray, sizes: Sizes) -> dict[str, float]:
    """Returns what moves when loads have drifted a little, and the balance then.

    Moves are shares of all slots.
    """
    previous = place(load_LE, *sizes)
    rng = np.random.default_rng(1)
    load_LE = load_LE * np.exp(DRIFT * rng.normal(size=load_LE.shape))
    scratch = place(load_LE, *sizes)
    kept = place(load_LE, *sizes, previous, tolerance=TOLERANCE)

    def balance(placed: Placement) -> float:
        slot_LR = placed.physical_to_logical
        return float(_balance_L(load_LE, slot_LR, sizes).mean())

    few, many = moves(previous, kept).mean(), moves(previous, scratch).mean()
    return {
        "balance_before": balance(previous),
        "balance_after": balance(kept),
        "balance_from_scratch": balance(scratch),
        "moves": float(few),
        "moves_from_scratch": float(many),
        "moves_of_those_from_scratch": float(few / many) if many else 0.0,
    }


def forecasts() -> dict[str, dict[str, float]]:
    """Returns the next window's balance, where experts are placed by past windows.

    `known`: by what that window's experts are chosen with.
    """
    rng = np.random.default_rng(2)
    found = {}
    for name, drift in (("stays", 0.0), ("drifts", 0.05), ("wanders", 0.4)):
        step_TLE = rng.normal(size=(WINDOWS + 1, 8, 64))
        step_TLE[1:] *= drift
        rate_TLE = np.exp(np.cumsum(step_TLE, axis=0))
        rate_TLE /= rate_TLE.sum(-1, keepdims=True)
        load_TLE = rng.multinomial(TOKENS, rate_TLE[:-1])
        found[name] = _next_balance(load_TLE, rate_TLE[-1], SMALL)
    return found


def _next_balance(
    load_TLE: np.ndarray, next_LE: np.ndarray, sizes: Sizes
) -> dict[str, float]:
    guesses = {
        "last": load_TLE[-1],
        "mean": load_TLE.mean(0),
        "forecast": forecast(load_TLE),
        "known": next_LE,
    }
    slots = {
        name: place(guess_LE, *sizes).physical_to_logical
        for name, guess_LE in guesses.items()
    }
    return {
        name: float(_balance_L(next_LE, slot_LR, sizes).mean())
        for name, slot_LR in slots.items()
    }


def over_time(recorded_NLE: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns each window's balance, averaged, where it is placed by those before it.

    On 16 devices, with a quarter more slots than experts at least. By DeepSeek's rule,
    each window is placed by the last one and from scratch; ours are placed by a
    forecast, from the previous placement. Moves are shares of all slots.
    """
    num_experts = recorded_NLE.shape[-1]
    sizes = Sizes(16 * -(-5 * num_experts // 64), 1, 1, 16)
    parts = np.array_split(recorded_NLE, min(WINDOWS, len(recorded_NLE)))
    load_TLE = np.stack([part.sum(0) for part in parts])
    unaware = place(np.ones(load_TLE.shape[1:]), *sizes)
    found = {name: {"balance": [], "moves": []} for name in ("unaware", "eplb", "ours")}
    last = {"unaware": unaware.physical_to_logical}
    ours = None
    for window in range(1, len(load_TLE)):
        ours = place(forecast(load_TLE[:window]), *sizes, ours, tolerance=TOLERANCE)
        rule = [eplb.rule(load_E, *sizes) for load_E in load_TLE[window - 1].tolist()]
        now = {
            "unaware": unaware.physical_to_logical,
            "eplb": np.array(rule),
            "ours": ours.physical_to_logical,
        }
        for name, slot_LR in now.items():
            balance_L = _balance_L(load_TLE[window], slot_LR, sizes)
            found[name]["balance"].append(balance_L.mean())
            if name in last:
                found[name]["moves"].append((slot_LR != last[name]).mean())
        last = now
    return {
        name: {what: float(np.mean(values)) for what, values in figures.items()}
        for name, figures in found.items()
    }


def seconds(*loads: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns a processor's time for all layers on 320 devices, by the slowest load."""
    found = {}
    for sizes in TIMED:
        scratch, again = [], []
        for load_LE in loads:
            scratch.append(_timed(functools.partial(place, load_LE, *sizes)))
            previous = place(load_LE, *sizes)
            drifted_LE = load_LE[:, ::-1] * 0.1 + load_LE
            again.append(_timed(functools.partial(place, drifted_LE, *sizes, previous)))
        found[f"{sizes.num_replicas} replicas on {sizes.num_devices} devices"] = {
            "from_scratch": max(scratch),
            "from_previous": max(again),
        }
    return found


def _timed(call: Callable[[], Any]) -> float:
    begin = time.process_time()  # others may be busy, and this has one thread
    call()
    return time.process_time() - begin


def _zipf(rng: np.random.Generator) -> np.ndarray:
    load_E = 1 / np.arange(1, EXPERTS + 1) ** 0.8
    return np.stack([rng.permutation(load_E) for _ in range(LAYERS)])


def _balance_L(load_LE: np.ndarray, slot_LR: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Returns the balance of each layer."""
    experts_E = np.arange(load_LE.shape[1])
    count_LE = (slot_LR[:, :, None] == experts_E).sum(1)
    placed = Placement(slot_LR, np.empty(0), count_LE)
    load_LD = device_load(load_LE, placed, sizes.num_devices)
    return load_LD.max(-1) / load_LD.mean(-1)
