"""Pipeline schedules as data: made, checked and simulated without a device.

    schedule = build("dualpipe", 8, 20)
    check(schedule)
    timeline = simulate(schedule, Costs(forward=1, backward=2, weight=1))
    timeline.bubble, timeline.peak_activations

Whoever runs one follows `schedule.tasks[rank]`. A new schedule is a function from ranks
and microbatches to a `Schedule`, entered in `SCHEDULES`.
"""

from collections.abc import Callable
from typing import Any

from jmoe.config.checks import lookup
from jmoe.parallel.schedule.dual import dualpipe, dualpipe_v
from jmoe.parallel.schedule.one_way import gpipe, interleaved_1f1b, one_f_one_b, zb_h1
from jmoe.parallel.schedule.order import check
from jmoe.parallel.schedule.simulate import Costs, Span, Timeline, simulate
from jmoe.parallel.schedule.tasks import KINDS, Pass, Schedule, Task

__all__ = [
    "KINDS",
    "SCHEDULES",
    "Costs",
    "Pass",
    "Schedule",
    "Span",
    "Task",
    "Timeline",
    "build",
    "check",
    "simulate",
]

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "zb_h1": zb_h1,
    "dualpipe": dualpipe,
    "dualpipe_v": dualpipe_v,
}


MAX_PASSES = 2**20  # forward passes that a schedule may have, to be made in memory


def build(name: str, num_ranks: int, num_microbatches: int, **options: Any) -> Schedule:
    """Builds the named schedule; `options` are its own, as interleaved_1f1b's `chunks`.

    Raises:
      ValueError: the name is unknown, or the schedule can't take as many ranks or
        microbatches, or would have more than MAX_PASSES.
    """
    make = lookup(SCHEDULES, name, "schedule")
    for field, value in (
        ("num_ranks", num_ranks),
        ("num_microbatches", num_microbatches),
    ):
        if value < 1:
            raise ValueError(f"{name}: {field}={value} must be at least 1.")
    passes = num_ranks * num_microbatches * options.get("chunks", 1)
    if passes > MAX_PASSES:
        raise ValueError(
            f"{name}: num_ranks={num_ranks} and num_microbatches={num_microbatches} "
            f"make {passes} forward passes; there may be {MAX_PASSES}."
        )
    return make(num_ranks, num_microbatches, **options)
