"""A schedule as all ranks run it together, tick by tick.

One program runs on every rank, and between two ticks neighbours hand each other what
they made. So a rank waits for its neighbours at every tick, and a tick takes as long as
its longest task. Therefore a whole backward pass is two ticks, B and W, each about as
long as F; an overlapped pair of passes stays one.

Where things are stored is decided here too. What F keeps stays in a *kept* slot of its
rank until W is done, what B owes W in an *owed* slot. What arrives at the end of a tick
waits in an *inbox* slot until the tick that takes it: the one for F, where the last
stage's own outputs wait for their loss too, or the one for B.
"""

import dataclasses
import heapq
from collections.abc import Iterator
from typing import NamedTuple

from jmoe.parallel.schedule.order import in_order, needs
from jmoe.parallel.schedule.simulate import Costs, Time
from jmoe.parallel.schedule.tasks import Pass, Schedule, Task

# Which way something travels: to oneself, to the next rank, to the one before. Ranks
# form a ring.
SELF, UP, DOWN = 0, 1, -1


class Delivery(NamedTuple):
    """What a rank sends at the end of a tick, and the inbox slot that it comes to."""

    way: int
    slot: int


class Entry(NamedTuple):
    """A pass in its tick, and its slots.

    source: inbox slot of what it takes; None at the first stage's F, and for W. The
    last stage's B takes its own stage's output, from the inbox for F. delivery: None
    for the first stage's B, which has nobody to send to, and for W.
    """

    step: Pass
    hosted: int  # which of its rank's (stage, direction) it is in
    source: int | None
    kept: int
    owed: int | None
    delivery: Delivery | None


@dataclasses.dataclass(frozen=True)
class Ticks:
    """What each rank does in each tick, and how many slots that takes of each kind.

    schedule: the one that was given, with its BW cut in two.
    """

    schedule: Schedule
    tasks: tuple[tuple[Task | None, ...], ...]  # [tick][rank]
    entries: tuple[tuple[tuple[Entry, ...], ...], ...]  # [tick][rank][pass]
    kept_slots: int
    owed_slots: int
    forward_slots: int
    backward_slots: int

    @property
    def count(self) -> int:
        return len(self.tasks)

    def has(self, kind: str) -> bool:
        """Returns whether any task is of this kind."""
        return any(
            task is not None and task.kind == kind
            for tasks in self.tasks
            for task in tasks
        )

    def time(self, costs: Costs) -> Time:
        """Returns the time that the longest tasks of every tick take."""
        return sum(
            max(costs.of(task) for task in tasks if task is not None)
            for tasks in self.tasks
        )

    def ways(self, kind: str) -> tuple[int, ...]:
        """Returns the ways that results of F, or of B, take."""
        found = {
            entry.delivery.way
            for ranks in self.entries
            for entries in ranks
            for entry in entries
            if entry.step.kind == kind and entry.delivery is not None
        }
        return tuple(sorted(found))


def forward_only(schedule: Schedule) -> Schedule:
    """Returns a schedule's forward passes: what is left when nothing is trained."""
    tasks = tuple(
        tuple(Task((task.forward,)) for task in tasks if task.forward is not None)
        for tasks in schedule.tasks
    )
    return dataclasses.replace(schedule, tasks=tasks)


def as_ticks(schedule: Schedule) -> Ticks:
    """Puts each task in the first tick after those that it needs.

    Raises:
      ValueError: the schedule can't be run.
    """
    schedule = dataclasses.replace(
        schedule, tasks=tuple(tuple(_halved(tasks)) for tasks in schedule.tasks)
    )
    tick_of: dict[Pass, int] = {}
    next_free = [0] * schedule.num_ranks
    placed: list[tuple[int, int, Task]] = []
    for rank, task in in_order(schedule):
        before = [tick_of[step] for step in needs(schedule, task)]
        tick = max([next_free[rank], *(t + 1 for t in before)])
        next_free[rank] = tick + 1
        tick_of.update((step, tick) for step in task.passes)
        placed.append((tick, rank, task))
    tasks: list[list[Task | None]] = [
        [None] * schedule.num_ranks for _ in range(max(next_free, default=0))
    ]
    for tick, rank, task in placed:
        tasks[tick][rank] = task
    return _with_slots(schedule, tuple(map(tuple, tasks)), tick_of)


def _halved(tasks: tuple[Task, ...]) -> Iterator[Task]:
    for task in tasks:
        if task.kind == "BW":
            yield from (Task((step,)) for step in task.passes)
        else:
            yield task


class _Slots:
    """Hands out the lowest free number; tells how many it ever needed."""

    def __init__(self):
        self._free: list[int] = []
        self._until: list[tuple[int, int]] = []  # last tick of use, and slot
        self.count = 0

    def take(self, first: int, last: int) -> int:
        """Returns a slot for ticks `first` to `last`; call it with growing `first`."""
        while self._until and self._until[0][0] < first:
            heapq.heappush(self._free, heapq.heappop(self._until)[1])
        if not self._free:
            heapq.heappush(self._free, self.count)
            self.count += 1
        slot = heapq.heappop(self._free)
        heapq.heappush(self._until, (last, slot))
        return slot


def _with_slots(
    schedule: Schedule,
    tasks: tuple[tuple[Task | None, ...], ...],
    tick_of: dict[Pass, int],
) -> Ticks:
    pools = {
        kind: [_Slots() for _ in range(schedule.num_ranks)]
        for kind in ("kept", "owed", "forward", "backward")
    }
    kept: dict[Pass, int] = {}
    owed: dict[Pass, int] = {}
    inbox: dict[Pass, int] = {}  # by the pass that takes from it

    def until(step: Pass, *kinds: str) -> int:
        """Returns the last tick of these passes of one microbatch and stage, if any."""
        ticks = [tick_of.get(step._replace(kind=kind)) for kind in kinds]
        return max((t for t in ticks if t is not None), default=tick_of[step])

    def deliver(step: Pass, rank: int, tick: int) -> Delivery | None:
        taker = _taker(schedule, step)
        if taker is None or taker not in tick_of:
            return None
        host = schedule.hosts[taker.direction][taker.stage]
        pool = pools["forward" if step.kind == "F" else "backward"][host]
        inbox[taker] = pool.take(tick + 1, tick_of[taker])
        return Delivery(_way(rank, host, schedule.num_ranks), inbox[taker])

    def enter(step: Pass, rank: int, tick: int) -> Entry:
        hosted = schedule.hosted(rank).index((step.stage, step.direction))
        first = step._replace(kind="F")
        if step.kind == "F":
            kept[step] = pools["kept"][rank].take(tick, until(step, "B", "W"))
        elif step.kind == "B":
            owed[first] = pools["owed"][rank].take(tick, until(step, "W"))
        delivery = None if step.kind == "W" else deliver(step, rank, tick)
        source = None if step.kind == "W" else inbox.get(step)
        return Entry(step, hosted, source, kept[first], owed.get(first), delivery)

    entries = tuple(
        tuple(
            tuple(enter(step, rank, tick) for step in task.passes) if task else ()
            for rank, task in enumerate(ranks)
        )
        for tick, ranks in enumerate(tasks)
    )
    counts = {name: max(s.count for s in slots) for name, slots in pools.items()}
    return Ticks(
        schedule=schedule,
        tasks=tasks,
        entries=entries,
        kept_slots=counts["kept"],
        owed_slots=counts["owed"],
        forward_slots=counts["forward"],
        backward_slots=counts["backward"],
    )


def _taker(schedule: Schedule, step: Pass) -> Pass | None:
    """Returns the pass that the result of F or B goes to; None if it goes nowhere.

    The output of the last stage waits for that stage's B, which begins with the loss.
    """
    if step.kind == "F":
        if step.stage + 1 < schedule.num_stages:
            return step._replace(stage=step.stage + 1)
        return step._replace(kind="B")
    return step._replace(stage=step.stage - 1) if step.stage else None


def _way(rank: int, host: int, num_ranks: int) -> int:
    if rank == host:
        return SELF
    if (rank + 1) % num_ranks == host:
        return UP
    assert (rank - 1) % num_ranks == host, "stages in a row are on neighbours"
    return DOWN
