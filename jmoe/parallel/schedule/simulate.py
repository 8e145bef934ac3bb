"""When a schedule's tasks would run, given what they take.

Costs may be int, Fraction or float: nothing is rounded, so that bubbles can be compared
with formulae exactly.
"""

import dataclasses
from fractions import Fraction
from typing import NamedTuple

from jmoe.parallel.schedule.order import in_order, live_activations, needs
from jmoe.parallel.schedule.tasks import Pass, Schedule, Task

Time = int | float | Fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What the passes of one microbatch through one stage take, in any unit of time.

    As in the papers' formulae, `backward` is the whole backward pass and `weight` the
    part of it that can be deferred: B takes their difference.

    Raises:
      ValueError: a cost is out of its range, or a part takes longer than the whole.
    """

    forward: Time = 1
    backward: Time = 2
    weight: Time = 1
    pair: Time | None = None  # F&BW; by default `forward + backward`
    latency: Time = 0  # from the end of a task to where another rank has its result

    def __post_init__(self):
        for field in ("forward", "backward"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be above 0.")
        for field in ("weight", "latency"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0.")
        if not self.weight <= self.backward:
            raise ValueError(
                f"weight={self.weight} must be at most backward={self.backward}, the "
                "pass that it is a part of."
            )
        if not self.overlapped >= max(self.forward, self.backward):
            raise ValueError(
                f"pair={self.pair} must be at least forward={self.forward} and "
                f"backward={self.backward}."
            )

    @property
    def overlapped(self) -> Time:
        return self.forward + self.backward if self.pair is None else self.pair

    def of(self, task: Task) -> Time:
        """Returns how long `task` takes."""
        return {
            "F": self.forward,
            "B": self.backward - self.weight,
            "W": self.weight,
            "BW": self.backward,
            "F&BW": self.overlapped,
            "F&B": self.overlapped - self.weight,
        }[task.kind]

    def times(self, factor: Fraction) -> "Costs":
        """Returns costs of a stage `factor` as large; what travels stays as large."""
        pair = None if self.pair is None else self.pair * factor
        return Costs(
            forward=self.forward * factor,
            backward=self.backward * factor,
            weight=self.weight * factor,
            pair=pair,
            latency=self.latency,
        )


class Span(NamedTuple):
    """A task and its time."""

    task: Task
    start: Time
    end: Time


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A schedule in time."""

    schedule: Schedule
    costs: Costs
    spans: tuple[tuple[Span, ...], ...]  # of each rank

    @property
    def makespan(self) -> Time:
        """The time from the first start to the last end."""
        return max((span.end for spans in self.spans for span in spans), default=0)

    @property
    def idle(self) -> tuple[Time, ...]:
        """How long each rank does nothing in that time."""
        busy = (sum(end - start for _, start, end in spans) for spans in self.spans)
        return tuple(self.makespan - time for time in busy)

    @property
    def bubble(self) -> Time:
        """The idle time of the rank that has most of it.

        All ranks have the same in most schedules. In DualPipe those in the middle
        overlap more, and are busy for a shorter time if that makes tasks faster; the
        published formula is theirs.
        """
        return max(self.idle)

    @property
    def peak_activations(self) -> int:
        """What the rank holds that holds most; in stages, see `live_activations`."""
        return max(map(live_activations, self.schedule.tasks))

    @property
    def parameters(self) -> int:
        """How much a rank holds of the model's parameters, in shares of 1 / ranks."""
        return self.schedule.num_directions


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Starts every task as soon as its rank is free and has what the task needs.

    Raises:
      ValueError: the schedule can't be run.
    """
    spans: list[list[Span]] = [[] for _ in schedule.tasks]
    ends: dict[Pass, tuple[int, Time]] = {}  # rank and time
    for rank, task in in_order(schedule):
        start: Time = spans[rank][-1].end if spans[rank] else 0
        for step in needs(schedule, task):
            host, end = ends[step]
            start = max(start, end if host == rank else end + costs.latency)
        spans[rank].append(Span(task, start, start + costs.of(task)))
        ends.update((step, (rank, spans[rank][-1].end)) for step in task.passes)
    return Timeline(schedule, costs, tuple(map(tuple, spans)))
