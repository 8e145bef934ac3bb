"""A step's gradients by each pipeline schedule, on virtual devices of the CPU.

    python scripts/bench.py --suite=pipeline

All ranks share the same cores, so that a rank which idles costs nothing, and a schedule
shows what it *does*: the tasks, and on top of them the executor's reading and writing
of slots, the hand-overs, and for DualPipe a second copy of the weights. The tasks' own
times are those of the same loops, called one by one on one device. A rank that waits
for another keeps one of XLA's threads; so there are as many more threads than cores as
there are ranks, and the last one at work in a tick has all cores. Ranks side by side
also use a core that a task by itself would leave idle: a step can take less time than
its tasks one by one.

What a schedule costs where each rank has cores of its own is in its ticks, of which
each takes as long as its longest task: `time in ticks` is the sum of these, by the
tasks' own times.

Eight layers of the `bench_s` shape with 32 experts, in float32, on 4 ranks; a step has
8 microbatches of one sequence. Weights are at rest before, and gradients after: the
step without the optimizer. One schedule after another takes turns with the tasks alone:
a step needs 5 to 7 GiB, so that not all of them can wait side by side. The second of a
turn's steps counts: as in training, it follows another. While a process waits, a
machine that is virtual itself may lose the memory that the last step has freed. All
sides have their memory in huge pages, which a script's user must ask for
(`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`).
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from experiments.benchmarks.report import Figure, Report
from experiments.benchmarks.workers import (
    HUGE_PAGES,
    Seat,
    Turn,
    Worker,
    cores,
    take_turns,
    virtual_devices,
)
from experiments.benchmarks.workload import Workload
from jmoe.config import ModelConfig, PipelineConfig, override
from jmoe.config.mesh import SCHEDULES
from jmoe.parallel.schedule import Costs
from jmoe.parallel.schedule.ticks import Ticks, as_ticks
from jmoe.train.runtime import keep_freed_memory
from jmoe.train.stages import make_schedule

RANKS, MICROBATCHES = 4, 8
STEPS_A_TURN = 2
ALONE = "tasks alone"
SIDE = "experiments.benchmarks.stage_tasks"


def run(rounds: int, say: Callable[[str], None]) -> Report:
    """Measures everything; `say` is told what comes next."""
    model = override(
        ModelConfig.preset("bench_s"),
        ["layer_loop=scan", "moe.router.num_experts=32"],
    )
    workload = Workload(model=model, batch=MICROBATCHES, length=512)
    say(f"{len(SCHEDULES)} schedules: compiling them takes some minutes")
    measured = measure(workload, rounds)
    return Report(
        suite="pipeline",
        compared=(),
        settings={
            "model": "bench_s with 32 experts",
            "ranks": RANKS,
            "microbatches": MICROBATCHES,
            "length": workload.length,
            "rounds": rounds,
        },
        figures=list(figures(measured)),
        samples={
            "loss": {
                name: of_name.step[-1].result for name, of_name in measured.items()
            },
            "seconds": {
                name: [turn.seconds for turn in of_name.step]
                for name, of_name in measured.items()
            },
            ALONE: {
                name: [turn.result for turn in of_name.alone]
                for name, of_name in measured.items()
            },
        },
    )


class Measured(NamedTuple):
    """Turns of a schedule's step, and those of the tasks alone in the same rounds."""

    step: Sequence[Turn]
    alone: Sequence[Turn]


def measure(
    workload: Workload, rounds: int, schedules: Sequence[str] = SCHEDULES
) -> dict[str, Measured]:
    """Schedules by name."""
    measured = {}
    with _worker("alone", devices=1, workload=workload, ranks=RANKS) as alone:
        for name in schedules:
            with _worker(
                "gradients",
                devices=RANKS,
                workload=workload,
                ranks=RANKS,
                pipeline=PipelineConfig(schedule=name),
            ) as step:
                seats = {
                    "step": Seat(step, "step", STEPS_A_TURN),
                    "alone": Seat(alone, "seconds"),
                }
                measured[name] = Measured(**take_turns(seats, rounds))
    return measured


def _worker(side: str, devices: int, **options) -> Worker:
    waiting = devices if devices > 1 else 0
    return Worker(
        f"{SIDE}.{side}",
        setup=keep_freed_memory,
        environment={
            **virtual_devices(devices),
            "NPROC": str(cores() + waiting),  # XLA's threads
            **HUGE_PAGES,
        },
        **options,
    )


def figures(measured: Mapping[str, Measured]) -> Iterator[Figure]:
    """Times, their ratios within a round, ticks and memory."""
    tasks = {
        name: [MICROBATCHES * sum(map(sum, t.result.values())) for t in of_name.alone]
        for name, of_name in measured.items()
    }
    steps = {
        name: [turn.seconds[-1] for turn in of_name.step]
        for name, of_name in measured.items()
    }
    yield Figure(
        name="tasks alone",
        value=statistics.median(itertools.chain(*tasks.values())),
        unit="s",
        definition=f"sum of all tasks of {MICROBATCHES} microbatches, one by one",
    )
    for name, seconds in steps.items():
        yield Figure(
            name=f"step, {name}",
            value=statistics.median(seconds),
            unit="s",
            definition=f"gradients of {MICROBATCHES} microbatches on {RANKS} ranks",
        )
    for name, seconds in steps.items():
        yield Figure(
            name=f"step, {name} / tasks alone",
            value=statistics.median(
                a / b for a, b in zip(seconds, tasks[name], strict=True)
            ),
            unit="×",
            definition="the median over rounds",
            at_most=1.15,
        )
    last = list(measured.values())[-1].alone[-1]
    costs = task_costs(last.result)
    for name in measured:
        ticks = make_ticks(name)
        yield Figure(
            name=f"ticks, {name}",
            value=ticks.count,
            unit="",
            definition="in which every rank has at most one task",
        )
        yield Figure(
            name=f"time in ticks, {name}",
            value=float(stage_share(ticks) * ticks.time(costs)),
            unit="s",
            definition="each tick as long as its longest task, by the stages' mean",
        )
    peak = {name: of_name.step[-1].peak_bytes for name, of_name in measured.items()}
    for name, size in {**peak, ALONE: last.peak_bytes}.items():
        yield Figure(
            name=f"peak memory, {name}",
            value=size / 2**30,
            unit="GiB",
            definition="ru_maxrss of all ranks, compilation included",
        )


def make_ticks(name: str) -> Ticks:
    return as_ticks(make_schedule(PipelineConfig(schedule=name), RANKS, MICROBATCHES))


def task_costs(seconds: Mapping[str, Sequence[float]]) -> Costs:
    """What the passes of a microbatch through a stage take, on average over stages."""
    forward, backward, weight = (statistics.mean(seconds[kind]) for kind in "FBW")
    return Costs(forward=forward, backward=backward + weight, weight=weight)


def stage_share(ticks: Ticks) -> float:
    """How large its stages are, of those that the tasks were measured of."""
    return RANKS / ticks.schedule.num_stages
