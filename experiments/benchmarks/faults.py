"""What is lost when a run is killed, its disk cut off or damaged, its server attacked.

    python scripts/bench.py --suite=faults
    python scripts/bench.py --suite=faults --set kills=5 --set cuts=3 --set damaged=50

Nothing here is fast or slow: cases are counted, each of them drawn by a seed, and what
is asked is that none of them loses anything. Five parts, of which a count of 0 leaves
one out:

kills     tiny runs, killed at random moments and resumed (`faults_kills`)
cuts      disks as a power cut leaves them, resumed from (`faults_cuts`)
damaged   checkpoints with flipped bits, missing files and so on (`faults_damage`)
saves     what a save costs a step, against a save that is waited for (`saves`)
requests  hostile ones to a served tiny model (`faults_serving`, `hostile`); needs Ray
          and vLLM: run the suite by the Python of scripts/make_serving_env.sh

What fault tests share lies in tests/faults.
"""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.benchmarks import (
    faults_cuts,
    faults_damage,
    faults_kills,
    faults_serving,
)
from experiments.benchmarks.report import ROOT, Figure, Report
from experiments.benchmarks.workers import Tasks, Worker
from jmoe.config import checks

_SHOWN = 20  # results that are wrong, of each part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How many cases of each part there are."""

    kills: int = 50
    cuts: int = 30
    damaged: int = 500
    saves: int = 1  # measured or not
    requests: int = 300
    seed: int = 0

    def __post_init__(self):
        checks.at_least(self, **{field: 0 for field in (*PARTS, "seed")})


class Part(NamedTuple):
    """samples: whatever JSON takes; why it was left out, as text, where it was."""

    figures: list[Figure]
    samples: Any
    wrong: Sequence[str] = ()


def run(rounds: int, say: Callable[[str], None], settings: Settings) -> Report:
    """Measures everything; `say` is told what comes next. There are no rounds."""
    del rounds
    directory = ROOT / "runs"
    directory.mkdir(exist_ok=True)
    done: dict[str, Part] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="faults_", dir=directory) as parent:
        for name, part in PARTS.items():
            if count := getattr(settings, name):
                say(f"{name}: {count}")
                place = pathlib.Path(parent, name)
                place.mkdir()
                start = time.monotonic()
                done[name] = part(place, count, settings.seed)
                seconds[name] = time.monotonic() - start
                if isinstance(done[name].samples, str):
                    say(done[name].samples)
    return Report(
        suite="faults",
        compared=("orbax-checkpoint", "ray", "vllm"),
        settings=dataclasses.asdict(settings),
        figures=[figure for part in done.values() for figure in part.figures],
        samples={name: part.samples for name, part in done.items()}
        | {"seconds": seconds},
        wrong=tuple(
            f"{name}: {line}"
            for name, part in done.items()
            for line in part.wrong[:_SHOWN]
        ),
    )


def kills(directory: pathlib.Path, count: int, seed: int) -> Part:
    trial = faults_kills.measure(directory, count, seed)
    figures = list(faults_kills.figures(trial, count))
    return Part(figures, {"kills": trial.kills}, lines(trial.wrong))


def cuts(directory: pathlib.Path, count: int, seed: int) -> Part:
    result = in_process("faults_cuts.tasks", directory=directory, cuts=count, seed=seed)
    figures = list(faults_cuts.figures(result, count))
    return Part(figures, result, lines(result["wrong"]))


def damaged(directory: pathlib.Path, count: int, seed: int) -> Part:
    result = in_process(
        "faults_damage.tasks", directory=directory, cases=count, seed=seed
    )
    figures = list(faults_damage.figures(result, count))
    return Part(figures, result, result["wrong"])


def saves(directory: pathlib.Path, count: int, seed: int) -> Part:
    del count, seed
    result = in_process("faults.saving", directory=directory)
    stall = Figure(
        name="stall of a save",
        value=result["stall_share"],
        unit="share",
        definition="seconds until training may go on, over those until a checkpoint of "
        f"{result['checkpoint_bytes'] / 2**30:.1f} GiB is on the disk",
        at_most=0.05,
    )
    return Part([stall], result)


def saving(directory: pathlib.Path) -> Tasks:
    """`measure`, in a process of its own."""
    from experiments.benchmarks import saves

    return {"measure": lambda: saves.measure(directory)}


def requests(directory: pathlib.Path, count: int, seed: int) -> Part:
    missing = faults_serving.missing()
    if missing:
        return Part([], f"Skipped: {', '.join(missing)} is not installed here.")
    from experiments.benchmarks import hostile

    with faults_serving.served(directory) as (url, key, pids):
        hostile.measure(url, key=key, pids=pids, count=count)  # memory used again
        result = hostile.measure(url, key=key, pids=pids, count=count)
    return Part(list(faults_serving.figures(result, count)), result)


PARTS = {part.__name__: part for part in (kills, cuts, damaged, saves, requests)}


def in_process(side: str, **options: Any) -> Any:
    """What `measure` of a side returns, in a process of its own, on one CPU device."""
    environment = {"JAX_PLATFORMS": "cpu"}
    with Worker(
        f"experiments.benchmarks.{side}", environment=environment, **options
    ) as worker:
        return worker.run("measure").result


def lines(wrong: Mapping[Any, Sequence[str]]) -> list[str]:
    return [f"{case}: {line}" for case, found in wrong.items() for line in found]
