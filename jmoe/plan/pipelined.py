"""What the compiled step of a pipeline says of its passes.

Loops over a stage's layers have no length that is known to the compiler: each rank has
its own. A collective in one of them must leave the other ranks of the pipeline out, or
it would wait for devices that never come.
"""

from collections.abc import Sequence
from typing import Any

from jmoe.parallel.pipeline import AXIS
from jmoe.plan.traffic import Collective

# Passes of which the other microbatch's are, seen from one pass.
OTHERS = {
    "forward": ("backward", "weight"),
    "backward": ("forward",),
    "weight": ("forward",),
}
TOKENS = ("all-to-all", "ragged-all-to-all")


def overlapped(collectives: Sequence[Collective]) -> list[Collective]:
    """Those of the loop that takes a layer of one microbatch forward, another's back.

    No other computation has collectives of both.
    """
    phases: dict[str, set[str]] = {}
    for c in collectives:
        phases.setdefault(c.computation, set()).add(c.phase)
    return [
        c for c in collectives if {"forward", "backward"} <= phases[c.computation]
    ]


def crosses(collective: Collective) -> bool:
    """Whether it spans a matrix product of the other microbatch."""
    spans = collective.spans or {}
    return any(spans.get(phase) for phase in OTHERS.get(collective.phase, ()))


def exchanges(collectives: Sequence[Collective]) -> list[Collective]:
    """Those that bring tokens or their gradients to experts or back; not of gates.

    Gates and choices are a hundredth of the bytes.
    """
    found = [c for c in collectives if c.kind in TOKENS]
    most = max((c.moved_bytes for c in found), default=0)
    return [c for c in found if 10 * c.moved_bytes > most]


def waiting(collectives: Sequence[Collective]) -> list[Collective]:
    """Those between ranks of the pipeline that one of the ranks might skip."""
    return [c for c in collectives if c.optional and AXIS in c.axes]


def row(c: Collective) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "phase": c.phase,
        "kind": c.kind,
        "axes": c.axes,
        "sent_bytes": c.moved_bytes,
        "spans": c.spans,
    }
