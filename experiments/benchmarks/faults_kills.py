"""A run that is killed again and again, against one that never was.

The moments are random: while it starts, between two steps, in the midst of a save, when
it is all but done. Most of a run's time between its steps goes to saves, and so do most
of the kills.
"""

import concurrent.futures
import dataclasses
import pathlib
import random
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.benchmarks import faults_runs
from experiments.benchmarks.report import Figure
from experiments.benchmarks.workers import cores
from jmoe.train import run_files
from tests.faults import starts

IMPORTS = ("jmoe.train.loop", "jmoe.decode.generate", "jmoe.decode.on_mesh")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
# How often each kind of moment is drawn.
SHARES = {"starting": 0.15, "training": 0.7, "ending": 0.15}
_AFTER_A_STEP_S = 0.3  # at most; a save takes about as long
_KILLS_A_RUN = 6
_PATIENCE_S = 600
_TAIL = 400  # characters of what a failed start printed
# What a start says of where it goes on from.
_GOES_ON = re.compile(r"checkpoint of\s+step\s+(\d+)")


class Times(NamedTuple):
    """Seconds of a start: until its first row, and from its last one to its end."""

    starting: float
    ending: float


class Moment(NamedTuple):
    """So many seconds after a row of `step` or a later one was written; 0: at once."""

    kind: str
    step: int
    delay: float


@dataclasses.dataclass
class Trial:
    """What became of runs."""

    runs: int = 0
    kills: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)  # of runs
    older: int = 0  # starts that went on from another checkpoint than the newest


def measure(directory: pathlib.Path, kills: int, seed: int) -> Trial:
    """Kills runs below `directory` so often, each until it is done all the same."""
    settings = faults_runs.settings(directory / "data")
    command = ["--experiment=tests/smallest_run.py", *(f"--set={s}" for s in settings)]
    with _program() as program:
        _run(program, command, directory / "first")  # compiles
        times = _run(program, command, directory / "unharmed")
    want = faults_runs.read_end(directory / "unharmed")

    def lane(index: int) -> Trial:
        trial, chance = Trial(), random.Random(f"{seed} {index}")
        share = kills // lanes + (index < kills % lanes)
        with _program() as program:
            while len(trial.kills) < share:
                left = min(share - len(trial.kills), _KILLS_A_RUN)
                workdir = directory / f"{index}-{trial.runs}"
                _suffer(program, command, workdir, left, chance, times, trial)
                if workdir.exists():
                    _compare(workdir, want, trial)
        return trial

    lanes = min(cores(), kills)
    with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        trials = list(pool.map(lane, range(lanes)))
    unharmed = faults_runs.read_end(directory / "first")
    differs = [f"never killed: {d}" for d in faults_runs.differences(unharmed, want)]
    return Trial(
        runs=sum(trial.runs for trial in trials),
        kills=[kill for trial in trials for kill in trial.kills],
        wrong=differs + [line for trial in trials for line in trial.wrong],
        older=sum(trial.older for trial in trials),
    )


def figures(trial: Trial, kills: int) -> Iterator[Figure]:
    yield Figure(
        name="kills",
        value=len(trial.kills),
        unit="",
        definition=f"kill -9 at random moments of {trial.runs} runs, each resumed "
        "until it was done",
        at_least=kills,
    )
    yield Figure(
        name="killed runs that end otherwise",
        value=len({line.partition(":")[0] for line in trial.wrong}),
        unit="runs",
        definition="a bit of any kept checkpoint's parameters, moments, bias or data "
        "position, or any row of a log, is not that of a run never killed",
        at_most=0,
    )
    yield Figure(
        name="resumed from another checkpoint than the newest",
        value=trial.older,
        unit="starts",
        definition="starts after a kill that went on from an older one than the newest "
        "that had its name when the process was killed",
        at_most=0,
    )
    yield Figure(
        name="lost to a kill, at most",
        value=max((kill["logged"] - kill["saved"] for kill in trial.kills), default=0),
        unit="steps",
        definition=f"steps logged beyond the newest checkpoint; one is due every "
        f"{faults_runs.SAVE_EVERY} steps and may still be being written when the next "
        "is due",
        at_most=2 * faults_runs.SAVE_EVERY,
    )


def _program() -> starts.Program:
    return starts.Program(
        "jmoe.commands.train", imports=IMPORTS, environment=ENVIRONMENT
    )


def _run(program: starts.Program, command: list[str], workdir: pathlib.Path) -> Times:
    """A whole run; raises RuntimeError where it fails."""
    began = time.time()
    out = workdir.with_suffix(".out")
    start = program.start([*command, f"--workdir={workdir}"], out)
    if start.wait(_PATIENCE_S):
        raise RuntimeError(f"A run failed unharmed: {out.read_text()[-_TAIL:]}")
    rows = list(run_files.read_rows(workdir / run_files.METRICS))
    return Times(rows[0]["time"] - began, time.time() - rows[-1]["time"])


def _suffer(
    program: starts.Program,
    command: list[str],
    workdir: pathlib.Path,
    kills: int,
    chance: random.Random,
    times: Times,
    trial: Trial,
) -> None:
    """One run: killed up to `kills` times, then left to finish."""
    trial.runs += 1
    out = workdir.with_suffix(".out")
    while True:
        saved = _newest(workdir)
        start = program.start([*command, f"--workdir={workdir}"], out)
        moment = draw(chance, saved, times) if kills else None
        if moment is None or not _comes(moment, start, workdir):
            start.wait(_PATIENCE_S)
        else:
            start.kill()
        said = _GOES_ON.search(out.read_text())
        if said and int(said[1]) != saved:
            trial.older += 1
        if start.code() == -9:
            kills -= 1
            logged = max(_logged(workdir, since=0), default=0)
            kill = {"moment": moment.kind, "logged": logged, "saved": _newest(workdir)}
            trial.kills.append({"run": workdir.name, **kill})
        else:
            break
    if start.code():
        trial.wrong.append(
            f"{workdir.name}: exit code {start.code()}: {out.read_text()[-_TAIL:]}"
        )


def draw(chance: random.Random, saved: int, times: Times) -> Moment:
    """When to kill a start that goes on from step `saved`."""
    (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
    if kind == "starting":
        return Moment(kind, 0, chance.uniform(0, times.starting))
    if kind == "ending":
        return Moment(kind, faults_runs.STEPS, chance.uniform(0, times.ending))
    steps = range(saved + 1, faults_runs.STEPS + 1) or [saved]
    return Moment(kind, chance.choice(steps[:12]), chance.uniform(0, _AFTER_A_STEP_S))


def _comes(moment: Moment, start: starts.Start, workdir: pathlib.Path) -> bool:
    """Waits for the moment; False if the process ends before it."""
    began = time.time() - 0.001  # a row's time is rounded
    path, size = workdir / run_files.METRICS, -1
    reached = not moment.step
    while not reached and start.code() is None:
        time.sleep(0.001)
        if path.exists() and path.stat().st_size != size:
            size = path.stat().st_size
            reached = max(_logged(workdir, began), default=-1) >= moment.step
    deadline = time.monotonic() + moment.delay
    while time.monotonic() < deadline and start.code() is None:
        time.sleep(0.001)
    return start.code() is None


def _logged(workdir: pathlib.Path, since: float) -> list[int]:
    rows = run_files.read_rows(workdir / run_files.METRICS)
    return [row["step"] for row in rows if row["time"] >= since]


def _newest(workdir: pathlib.Path) -> int:
    return max(faults_runs.steps_saved(workdir), default=0)


def _compare(workdir: pathlib.Path, want: faults_runs.End, trial: Trial) -> None:
    try:
        got = faults_runs.read_end(workdir)
        found = list(faults_runs.differences(got, want))
    except (ValueError, OSError) as error:
        found = [str(error)]
    trial.wrong += [f"{workdir.name}: {difference}" for difference in found]
    if not found:
        shutil.rmtree(workdir)
