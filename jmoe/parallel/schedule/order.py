"""Whether a schedule can be run, and in which order over all ranks.

Sending is taken to wait for nobody: a rank starts a task once it has done those before
and the passes that it needs are done, wherever they are.
"""

import collections
from collections.abc import Iterator

from jmoe.parallel.schedule.tasks import Pass, Schedule, Task


def needs(schedule: Schedule, task: Task) -> Iterator[Pass]:
    """Yields the passes that must be done before `task` may start.

    F needs the stage before; B its own F and the stage after; W its own B.
    """
    for step in task.passes:
        if step.kind == "F" and step.stage > 0:
            yield step._replace(stage=step.stage - 1)
        if step.kind == "B":
            yield step._replace(kind="F")
            if step.stage + 1 < schedule.num_stages:
                yield step._replace(stage=step.stage + 1)
        if step.kind == "W" and task.kind == "W":  # else it has its B with it
            yield step._replace(kind="B")


def in_order(schedule: Schedule) -> Iterator[tuple[int, Task]]:
    """Yields all (rank, task), each after what it needs, and in its rank's order.

    Raises:
      ValueError: there is no such order; it names a task that waits in vain.
    """
    remaining = [collections.deque(tasks) for tasks in schedule.tasks]
    waiting: dict[Pass, list[int]] = collections.defaultdict(list)
    done: set[Pass] = set()
    ready = collections.deque(range(schedule.num_ranks))
    while ready:
        rank = ready.popleft()
        while remaining[rank]:
            task = remaining[rank][0]
            missing = next((p for p in needs(schedule, task) if p not in done), None)
            if missing is not None:
                waiting[missing].append(rank)
                break
            yield rank, remaining[rank].popleft()
            done.update(task.passes)
            for step in task.passes:
                ready.extend(waiting.pop(step, ()))
    if waiting:
        raise ValueError(_why_stuck(schedule, remaining, waiting))


def live_activations(tasks: tuple[Task, ...]) -> int:
    """Returns how many microbatches' activations of a stage a rank holds at most.

    They live from the start of F to the end of W, which needs them as much as B does.
    Where a paper counts to the end of a whole backward pass, that is the same.
    """
    live = most = 0
    for task in tasks:
        live += task.forward is not None
        most = max(most, live)
        live -= task.weight is not None
    return most


def check(schedule: Schedule) -> None:
    """Proves that the schedule can be run, is complete, and keeps its promise.

    Raises:
      ValueError: a pass is on another rank than its stage, missing, or there twice; an
        order waits for something that comes later or never; activations exceed the
        bound. It names the first found.
    """
    seen: set[Pass] = set()
    for rank, tasks in enumerate(schedule.tasks):
        hosted = schedule.hosted(rank)
        for step in (step for task in tasks for step in task.passes):
            if (step.stage, step.direction) not in hosted:
                raise ValueError(f"{schedule.name}: rank {rank} doesn't host {step}.")
            if step.microbatch not in schedule.microbatches(step.direction):
                raise ValueError(f"{schedule.name}: there is no {step}.")
            if step in seen:
                raise ValueError(f"{schedule.name}: {step} is there twice.")
            seen.add(step)
    for step in _all_passes(schedule):
        if step not in seen:
            raise ValueError(f"{schedule.name}: {step} is missing.")
    collections.deque(in_order(schedule), maxlen=0)
    for rank, tasks in enumerate(schedule.tasks):
        live = live_activations(tasks)
        if live > schedule.max_activations:
            raise ValueError(
                f"{schedule.name}: rank {rank} holds activations of {live} forward "
                f"passes, more than max_activations={schedule.max_activations}."
            )


def _all_passes(schedule: Schedule) -> Iterator[Pass]:
    for direction in range(schedule.num_directions):
        for microbatch in schedule.microbatches(direction):
            for stage in range(schedule.num_stages):
                for kind in ("F", "B", "W"):
                    yield Pass(kind, stage, microbatch, direction)


def _why_stuck(
    schedule: Schedule,
    remaining: list[collections.deque[Task]],
    waiting: dict[Pass, list[int]],
) -> str:
    """Says why what waits does so in vain.

    It names what its own rank has later, else a circle of ranks.
    """
    where = {
        step: rank
        for rank, tasks in enumerate(schedule.tasks)
        for task in tasks
        for step in task.passes
    }
    waits = {rank: step for step, ranks in waiting.items() for rank in ranks}
    for rank, step in sorted(waits.items()):
        task = remaining[rank][0]
        if step not in where:
            return f"{schedule.name}: {task} needs {step}, which is missing."
        if where[step] == rank:
            return f"{schedule.name}: rank {rank} has {task} before {step}."
    circle = [min(waits)]
    while circle.count(circle[-1]) < 2:
        circle.append(where[waits[circle[-1]]])
    circle = circle[circle.index(circle[-1]) :]
    told = [f"rank {rank} for {waits[rank]}" for rank in circle[:-1]]
    return f"{schedule.name}: deadlock; waiting are {', '.join(told)}."
