"""Pipeline schedules side by side: their comparison, and what drawings of them share.

All are of the same model on as many ranks. Costs are of what a rank of 1F1B holds, 1 /
ranks of the model; where a schedule cuts the model into more stages than ranks, each
takes as much less.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import rich.table

from jmoe.parallel import schedule as pipeline
from jmoe.parallel.schedule import Costs, Schedule, Task, Timeline

# Of each kind of passes the colours of a rank's first stage and of its last; others lie
# between.
COLOURS = {
    "F": ("#b3d1f0", "#2b6cb0"),
    "BW": ("#b5dfc0", "#2f855a"),
    "B": ("#dac8f0", "#7046ac"),
    "W": ("#fbd9a2", "#c46a12"),
}
MEANINGS = {
    "F": "forward",
    "BW": "whole backward",
    "B": "backward for the input",
    "W": "backward for the weights",
    "F&BW": "forward and whole backward, overlapped",
}
MAX_COST = 1_000_000
LATER = "the other direction, or a later stage of the rank"


class TaskPart(NamedTuple):
    """What a task does at a time, as it is drawn; an overlapped pair has two."""

    kind: str  # F, B, W or BW
    microbatch: int
    shade: Fraction  # from 0 to 1, which of the rank's stages it is

    @property
    def colour(self) -> str:
        """The colour between the kind's two, as #rrggbb."""
        first, last = (
            [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            for colour in COLOURS[self.kind]
        )
        mixed = (
            round(a + (b - a) * self.shade) for a, b in zip(first, last, strict=True)
        )
        return "#" + "".join(f"{value:02x}" for value in mixed)

    @property
    def is_later(self) -> bool:
        """Whether its colour is dark."""
        return self.shade > Fraction(1, 2)

    @property
    def ink(self) -> str:
        """The colour that can be read on its own."""
        return "#ffffff" if self.is_later else "#1a202c"


def parts(schedule: Schedule, rank: int, task: Task) -> list[TaskPart]:
    """Returns a task's parts, F first if there is one."""
    forward, backward = task.forward, [p for p in task.passes if p.kind != "F"]
    groups = ([forward] if forward else [], backward)
    hosted = schedule.hosted(rank)
    found = []
    for passes in filter(None, groups):
        _, stage, microbatch, direction = passes[0]
        place = hosted.index((stage, direction))
        kind = "".join(p.kind for p in passes)
        found.append(
            TaskPart(kind, microbatch, Fraction(place, max(len(hosted) - 1, 1)))
        )
    return found


def parse_costs(spec: str) -> Costs:
    """Returns the costs that "forward=1,backward=2.5" describes, exactly.

    Raises:
      ValueError: an item isn't cost=number, no such cost is known or it was given
        before, or the number is negative, above MAX_COST or written with an exponent.
    """
    known = ("forward", "backward", "weight", "pair", "latency")
    costs = {}
    for item in filter(None, spec.split(",")):
        name, _, number = item.strip().partition("=")
        try:  # an exact power of ten may be more than memory holds
            cost = Fraction(-1) if "e" in number.lower() else Fraction(number)
        except (ValueError, ZeroDivisionError):
            cost = Fraction(-1)
        if name not in known or name in costs or not 0 <= cost <= MAX_COST:
            raise ValueError(
                f"costs={spec!r}: {item.strip()!r} must read cost=number, with costs "
                f"of {', '.join(known)}, each once, and a number from 0 to "
                f"{MAX_COST:,}, without an exponent."
            )
        costs[name] = cost
    return Costs(**costs)


def make(
    name: str, num_ranks: int, num_microbatches: int, costs: Costs, **options: int
) -> Timeline:
    """Makes the named schedule, checked and simulated.

    Raises:
      ValueError: see `jmoe.parallel.schedule.build`.
    """
    schedule = pipeline.build(name, num_ranks, num_microbatches, **options)
    pipeline.check(schedule)
    part = Fraction(num_ranks, schedule.num_stages)
    return pipeline.simulate(schedule, costs.times(part))


def activations(timeline: Timeline) -> Fraction:
    """Returns the peak, in microbatches through 1 / ranks of the model."""
    schedule = timeline.schedule
    return timeline.peak_activations * Fraction(schedule.num_ranks, schedule.num_stages)


def table(timelines: Sequence[Timeline]) -> rich.table.Table:
    """Returns a row a schedule; what is best in a column is bold."""
    out = rich.table.Table(title="Schedules compared", title_justify="left")
    out.add_column("schedule")
    for column in ("makespan", "bubble", "idle", "peak activations", "parameters"):
        out.add_column(column, justify="right")
    rows = [
        (t.makespan, t.bubble, share(t), activations(t), t.parameters)
        for t in timelines
    ]
    best = [min(column) for column in zip(*rows, strict=True)]
    for timeline, row in zip(timelines, rows, strict=True):
        shown = [number(row[0]), number(row[1]), f"{float(row[2]):.1%}"]
        shown += [number(row[3]), f"{row[4]}x"]
        cells = (
            f"[bold]{cell}[/]" if value == low else cell
            for cell, value, low in zip(shown, row, best, strict=True)
        )
        out.add_row(timeline.schedule.name, *cells)
    return out


def share(timeline: Timeline) -> Fraction:
    """Returns the share of the ranks' time in which they idle, all ranks together."""
    whole = timeline.makespan * timeline.schedule.num_ranks
    return Fraction(sum(timeline.idle)) / Fraction(whole)


def number(value: Fraction | float) -> str:
    """Returns the number without decimals that are zeros."""
    return f"{float(value):.2f}".rstrip("0").rstrip(".")


def kinds(timelines: Sequence[Timeline]) -> dict[str, str]:
    """Returns the `MEANINGS` of what occurs."""
    orders = (tasks for t in timelines for tasks in t.schedule.tasks)
    found = {task.kind for tasks in orders for task in tasks}
    return {kind: said for kind, said in MEANINGS.items() if kind in found}


def has_later(timelines: Sequence[Timeline]) -> bool:
    """Returns whether any rank has more than one stage, which shades tell apart."""
    return any(len(t.schedule.hosted(0)) > 1 for t in timelines)
