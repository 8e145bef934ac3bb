"""What the compiled step of a pipeline says of its passes.

Loops over a stage's layers have no length that is known to the compiler: each rank has
its own. A collective in one of them must leave the other ranks of the pipeline out, or
it would wait for devices that never come.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Collectives of the overlapped loop, of one phase, kind and axes.

    sent_bytes: by a device, for one layer of each microbatch; crossing: the share of
    these that the other microbatch's matrix products hide.
    """

    phase: str
    kind: str
    axes: tuple[str, ...]
    count: int
    sent_bytes: int
    crossing: float


def overlapped(collectives: Sequence[Collective]) -> list[Collective]:
    """Returns the collectives of the overlapped loop.

    It takes a layer of one microbatch forward, and another's back.

    No other computation has collectives of both.
    """
    phases: dict[str, set[str]] = {}
    for c in collectives:
        phases.setdefault(c.computation, set()).add(c.phase)
    return [c for c in collectives if {"forward", "backward"} <= phases[c.computation]]


def crosses(collective: Collective) -> bool:
    """Returns whether it spans a matrix product of the other microbatch."""
    spans = collective.spans or {}
    return any(spans.get(phase) for phase in OTHERS.get(collective.phase, ()))


def overlaps(collectives: Sequence[Collective]) -> list[Overlap]:
    """Returns the overlapped loop's collectives by phase, kind and axes.

    The heaviest are first.
    """
    groups: dict[tuple[str, str, tuple[str, ...]], list[Collective]] = {}
    for c in overlapped(collectives):
        groups.setdefault((c.phase, c.kind, c.axes), []).append(c)
    rows = [
        Overlap(
            phase=phase,
            kind=kind,
            axes=axes,
            count=len(group),
            sent_bytes=(sent := sum(c.moved_bytes for c in group)),
            crossing=sum(c.moved_bytes for c in group if crosses(c)) / sent,
        )
        for (phase, kind, axes), group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.sent_bytes)


def waiting(collectives: Sequence[Collective]) -> list[Collective]:
    """Returns collectives between the pipeline's ranks that some ranks might skip."""
    return [c for c in collectives if c.optional and AXIS in c.axes]


def row(c: Collective) -> dict[str, Any]:
    """Returns a row as JSON has it."""
    return {
        "phase": c.phase,
        "kind": c.kind,
        "axes": c.axes,
        "sent_bytes": c.moved_bytes,
        "spans": c.spans,
    }
