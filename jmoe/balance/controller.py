"""What is done about load: thresholds turn what was measured into decisions.

`decide` is a pure function, called once a window of steps, on the host. What it may do:

- place: experts get other devices (`jmoe.balance.placement`), where the time that this
  wins within a horizon is more than what the moves take.
- drop: a device computes no more than so many choices of a layer; the least important
  ones go (`jmoe.balance.shedding`).
- fp8: tokens travel to experts in FP8.
- admit: fewer requests may wait.

The last three are *switches* on a gauge, which is a share of a limit: on above one
threshold, off below a lower one. A gauge that a switch itself has lowered must be so
low that it would stay below the upper threshold without it: else a constant load would
turn it on and off for ever. Two decisions of a kind are some windows apart.

Shapes: L MoE layer, E expert, P device.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jmoe.balance import placement
from jmoe.balance.forecast import forecast
from jmoe.balance.placement import Placement
from jmoe.config.controller import ADMIT, DROP, FP8, PLACE, ControllerConfig

_HISTORY = 8  # windows that tell what comes
_LEAST_RELIEF = 0.05  # of a switch: what is told of one window isn't certain


class System(NamedTuple):
    """What experts may be placed on, as `jmoe.balance.placement.place` has it."""

    devices: int
    groups: int = 1
    nodes: int = 1


class Window(NamedTuple):
    """What was measured over some steps.

    seconds: that all of them took; slowest: all but the slowest in a hundred took so
    many, at most. count_LE: choices of each expert. waiting: requests without a slot,
    on average; wait: seconds, at most, for which one had none. move_seconds: that it
    takes to move an expert of a layer; 0: not known yet.
    """

    steps: int
    seconds: float
    slowest: float
    count_LE: np.ndarray
    waiting: float = 0.0
    wait: float = 0.0
    move_seconds: float = 0.0


class Action(NamedTuple):
    """What is to be done, and why, with numbers in words.

    value: what to apply. "place": a `Placement`. "drop": how many choices a device
    computes in a layer of a step, "admit": how many requests may wait; None: as many as
    there are. "fp8": whether.
    """

    kind: str
    reason: str
    change: str
    value: Any


class Switch(NamedTuple):
    """Whether something is done, the gauge when that began, and what it has become.

    relief: as a fraction of that gauge; None: not known yet.
    """

    is_on: bool = False
    gauge: float = 0.0
    relief: float | None = None


class ControllerState(NamedTuple):
    """What `decide` remembers. Start with a placement and nothing else.

    history: counts [L, E] of the last windows. switches: by kind. since: of each kind
    that there was a decision of, how many windows ago.
    """

    placement: Placement
    history: tuple[np.ndarray, ...] = ()
    switches: Mapping[str, Switch] = {}
    since: Mapping[str, int] = {}


def decide(
    cfg: ControllerConfig, system: System, state: ControllerState, window: Window
) -> tuple[ControllerState, list[Action]]:
    """Returns what to remember, and what to do, behind a window.

    Raises:
      ValueError: counts are negative, or of another model than the placement.
    """
    check(state.placement, window.count_LE.shape, system)
    history = (*state.history, window.count_LE)[-_HISTORY:]
    since = {kind: windows + 1 for kind, windows in state.since.items()}
    state = ControllerState(state.placement, history, dict(state.switches), since)
    decisions = []
    for kind, rule in _RULES.items():
        if kind not in cfg.actions:
            continue
        is_cool = since.get(kind, cfg.cool_down) >= cfg.cool_down
        state, decision = rule(cfg, system, state, window, is_cool)
        if decision is not None:
            decisions.append(decision)
            since[kind] = 0
    return state, decisions


def check(found: Placement, shape: tuple[int, ...], system: System) -> None:
    """Refuses a placement for another model, or another number of devices.

    Args:
      shape: (L, E), the model's.

    Raises:
      ValueError: with both numbers.
    """
    given = found.replica_count.shape
    if given != tuple(shape):
        raise ValueError(
            f"The placement is for {given[0]} MoE layers of {given[1]} experts; this "
            f"model has {shape[0]} of {shape[1]}."
        )
    slots = found.physical_to_logical.shape[1]
    if slots % system.devices:
        raise ValueError(
            f"The placement's {slots} slots must divide over {system.devices} devices."
        )


def _place(
    cfg: ControllerConfig,
    system: System,
    state: ControllerState,
    window: Window,
    is_cool: bool,
) -> tuple[ControllerState, Action | None]:
    before = _busiest(window.count_LE, state.placement, system)
    if not is_cool or before <= 1 + cfg.uneven_above:
        return state, None
    load_LE = forecast(np.stack(state.history))
    found = placement.place(
        load_LE,
        state.placement.physical_to_logical.shape[1],
        *(system.groups, system.nodes, system.devices),
        previous=state.placement,
        tolerance=1 + cfg.uneven_below,
    )
    moves = int(placement.moves(state.placement, found).sum())
    now, then = (_busiest(load_LE, x, system) for x in (state.placement, found))
    won = max(1 - then / now, 0.0)
    step_seconds = window.seconds / window.steps
    gain = won * cfg.expert_share * step_seconds * cfg.horizon_steps
    cost = moves * window.move_seconds
    if not moves or gain <= cost:
        return state, None
    reason = (
        f"the busiest device has {before:.2f} of the mean load, above "
        f"{1 + cfg.uneven_above:.2f}; {cfg.horizon_steps} steps win {gain:.3g} s, the "
        f"moves take {cost:.3g} s"
    )
    change = f"{moves} slots hold another expert; {then:.2f} of the mean is expected"
    return state._replace(placement=found), Action(PLACE, reason, change, found)


def _busiest(load_LE: np.ndarray, found: Placement, system: System) -> float:
    """Returns by how much the busiest devices exceed the mean, over all layers.

    A step waits for the busiest of each layer.
    """
    load_LP = placement.device_load(load_LE, found, system.devices)
    total = load_LP.sum()
    return float(load_LP.max(-1).sum() * system.devices / total) if total else 1.0


def _drop(cfg, system, state, window, is_cool):
    if cfg.device_rows is None:
        return state, None
    load_LP = placement.device_load(window.count_LE, state.placement, system.devices)
    rows = float(load_LP.max()) / window.steps
    limit = int(cfg.above * cfg.device_rows)
    told = f"the busiest device computes {rows:.4g} choices in a layer of a step"
    on = f"devices compute {limit} at most, and the lowest gates go first", limit
    off = "no choice is dropped", None
    gauge = rows / cfg.device_rows
    return _switched(cfg, state, DROP, is_cool, gauge, told, on, off)


def _fp8(cfg, system, state, window, is_cool):
    if cfg.step_seconds is None:
        return state, None
    told = f"steps take up to {window.slowest:.4g} s"
    on, off = ("tokens travel in FP8", True), ("tokens travel as they are", False)
    gauge = window.slowest / cfg.step_seconds
    return _switched(cfg, state, FP8, is_cool, gauge, told, on, off)


def _admit(cfg, system, state, window, is_cool):
    if cfg.wait_seconds is None:
        return state, None
    gauge = window.wait / cfg.wait_seconds
    # So many of those that wait now would wait for no longer than they may.
    most = max(int(window.waiting * cfg.below / max(gauge, cfg.below)), 1)
    told = f"requests wait for up to {window.wait:.4g} s"
    on = f"{most} requests may wait", most
    off = "as many requests may wait as there are places", None
    return _switched(cfg, state, ADMIT, is_cool, gauge, told, on, off)


def _switched(
    cfg: ControllerConfig,
    state: ControllerState,
    kind: str,
    is_cool: bool,
    gauge: float,
    told: str,
    on: tuple[str, Any],
    off: tuple[str, Any],
) -> tuple[ControllerState, Action | None]:
    """Returns the state with this kind's switch as the gauge has it.

    Args:
      told: what was measured, in words. on, off: in words what changes, and the value.
    """
    switch = state.switches.get(kind, Switch())
    if switch.is_on and switch.relief is None:
        relief = min(max(gauge / switch.gauge, _LEAST_RELIEF), 1.0)
        switch = switch._replace(relief=relief)
    limit = (
        cfg.above if not switch.is_on else min(cfg.below, cfg.above * _relief(switch))
    )
    turns = gauge < limit if switch.is_on else gauge > limit
    decision = None
    if turns and is_cool:
        change, value = off if switch.is_on else on
        side = "below" if switch.is_on else "above"
        reason = f"{told}, {gauge:.2f} of the limit, {side} {limit:.2f}"
        decision = Action(kind, reason, change, value)
        switch = Switch() if switch.is_on else Switch(True, gauge)
    switches = {**state.switches, kind: switch}
    return state._replace(switches=switches), decision


def _relief(switch: Switch) -> float:
    return 1.0 if switch.relief is None else switch.relief


_RULES = {PLACE: _place, DROP: _drop, FP8: _fp8, ADMIT: _admit}
