"""A run that is killed again and again, against one that never was.

The moments are random: while it starts, between two steps, in the midst of a save, when
it is all but done. Many are lines of the code that writes checkpoints and logs, any
that a run comes to, where the process kills itself.
"""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.benchmarks import faults_runs
from experiments.benchmarks.report import ROOT, Figure
from experiments.benchmarks.workers import cores
from jmoe.monitor import run_files
from tests.faults import starts

IMPORTS = ("jmoe.train.loop", "jmoe.decode.generate", "jmoe.decode.on_mesh")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
# How often each kind of moment is drawn.
SHARES = {"starting": 0.1, "training": 0.4, "ending": 0.1, "line": 0.4}
LINES_OF = (
    "jmoe/checkpoint/*.py",
    "jmoe/data/durable.py",
    "jmoe/monitor/metrics_log.py",
)
_AFTER_A_STEP_S = 0.3  # at most; a save takes about as long
_STEPS_BEYOND = 12  # the checkpoint, at most, of a moment in training
_KILLS_A_RUN = 6
_PATIENCE_S = 600
_TAIL = 400  # characters of what a failed start printed
# What a start says of where it goes on from.
_GOES_ON = re.compile(r"checkpoint of\s+step\s+(\d+)")


class Moment(NamedTuple):
    """So many seconds after a row of `step` or a later one was written; 0: at once."""

    step: int
    delay: float


class Known(NamedTuple):
    """Describes a run never killed.

    Seconds to its first row and from its last to its end, and lines that it came to, as
    (file, line, times).
    """

    starting_s: float
    ending_s: float
    lines: list[tuple[str, int, int]]


@dataclasses.dataclass
class Trial:
    """What became of runs. older: starts that did not go on from the newest checkpoint
    there was; wrong: differences of their ends, by run."""

    runs: int = 0
    older: int = 0
    kills: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    wrong: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def measure(directory: pathlib.Path, kills: int, seed: int) -> Trial:
    """Kills runs below `directory` so often, each until it is done all the same."""
    settings = faults_runs.settings(directory.parent / "data")
    command = ["--experiment=tests/smallest_run.py", *(f"--set={s}" for s in settings)]
    with _program() as program:
        known = _know(program, command, directory)
    want = faults_runs.read_end(directory / "unharmed")
    first = list(
        faults_runs.differences(faults_runs.read_end(directory / "first"), want)
    )

    def lane(index: int) -> Trial:
        trial, chance = Trial(), random.Random(f"{seed} {index}")
        share = kills // lanes + (index < kills % lanes)
        with _program() as program:
            while len(trial.kills) < share:
                run = Run(program, command, directory / f"{index}-{trial.runs}")
                run.suffer(min(share - len(trial.kills), _KILLS_A_RUN), chance, known)
                run.add_to(trial, want)
        return trial

    lanes = min(cores(), kills)
    with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        trials = list(pool.map(lane, range(lanes)))
    wrong = {"never killed": first} if first else {}
    for trial in trials:
        wrong |= trial.wrong
    return Trial(
        runs=sum(trial.runs for trial in trials),
        older=sum(trial.older for trial in trials),
        kills=[kill for trial in trials for kill in trial.kills],
        wrong=wrong,
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
        value=len(trial.wrong),
        unit="runs",
        definition="a bit of a kept checkpoint's parameters, moments, bias or data "
        "position, or a row of a log, is not that of a run never killed",
        at_most=0,
    )
    yield Figure(
        name="resumed from another checkpoint than the newest",
        value=trial.older,
        unit="starts",
        definition="starts after a kill that went on from another one than the newest "
        "that had its name when the process was killed",
        at_most=0,
    )
    yield Figure(
        name="lost to a kill, at most",
        value=max((kill["logged"] - kill["saved"] for kill in trial.kills), default=0),
        unit="steps",
        definition="steps logged beyond the newest checkpoint; one is due every "
        f"{faults_runs.SAVE_EVERY} steps, and may still be being written when the next "
        "is due",
        at_most=2 * faults_runs.SAVE_EVERY,
    )


class Run:
    """One run in a workdir of its own, started as often as it takes."""

    def __init__(
        self, program: starts.Program, command: list[str], workdir: pathlib.Path
    ):
        self.workdir = workdir
        self.kills: list[dict[str, Any]] = []
        self.code: int | None = None  # of the last start
        self.older = 0
        self._program, self._command = program, [*command, f"--workdir={workdir}"]
        self._out = workdir.with_suffix(".out")

    def suffer(self, kills: int, chance: random.Random, known: Known) -> None:
        """Is killed at most so many times, then left to finish."""
        killed = -signal.SIGKILL
        while self.code in (None, killed):
            saved = self.saved()
            alive = len(self.kills) < kills and saved < faults_runs.STEPS
            kinds = SHARES if alive else {"never": 1.0}
            (kind,) = chance.choices(list(kinds), list(kinds.values()))
            first = draw_line(chance, saved, known) if kind == "line" else ()
            start = self._program.start(self._command, self._out, *first)
            moment = draw_moment(kind, chance, saved, known)
            if moment is not None and self._comes(moment, start):
                start.kill()
            self.code = start.wait(_PATIENCE_S)
            said = _GOES_ON.search(self._out.read_text())
            self.older += said is not None and int(said[1]) != saved
            if self.code == killed:
                logged = max(self._logged(since=0), default=0)
                kill = {"moment": kind, "logged": logged, "saved": self.saved()}
                self.kills.append(kill | _place(first))

    def add_to(self, trial: Trial, want: faults_runs.End) -> None:
        """What became of it; if all is right, its files are removed."""
        trial.runs += 1
        trial.older += self.older
        trial.kills += [{"run": self.workdir.name, **kill} for kill in self.kills]
        if self.code:
            said = self._out.read_text()[-_TAIL:]
            trial.wrong[self.workdir.name] = [f"exit code {self.code}: {said}"]
            return
        try:
            found = list(
                faults_runs.differences(faults_runs.read_end(self.workdir), want)
            )
        except (ValueError, OSError) as error:
            found = [str(error)]
        if found:
            trial.wrong[self.workdir.name] = found
        else:
            shutil.rmtree(self.workdir)

    def saved(self) -> int:
        return max(faults_runs.steps_saved(self.workdir), default=0)

    def _logged(self, since: float) -> list[int]:
        rows = run_files.read_rows(self.workdir / run_files.METRICS)
        return [row["step"] for row in rows if row["time"] >= since]

    def _comes(self, moment: Moment, start: starts.Start) -> bool:
        """Waits for the moment; False if the process ends before it."""
        began = time.time() - 0.001  # a row's time is rounded
        path, size = self.workdir / run_files.METRICS, -1
        reached = not moment.step
        while not reached and start.code() is None:
            time.sleep(0.001)
            if path.exists() and path.stat().st_size != size:
                size = path.stat().st_size
                reached = max(self._logged(began), default=-1) >= moment.step
        deadline = time.monotonic() + moment.delay
        while time.monotonic() < deadline and start.code() is None:
            time.sleep(0.001)
        return start.code() is None


def draw_moment(
    kind: str, chance: random.Random, saved: int, known: Known
) -> Moment | None:
    """When to kill a start that goes on from step `saved`; None: not from outside."""
    last = faults_runs.STEPS
    match kind:
        case "starting":
            return Moment(0, chance.uniform(0, known.starting_s))
        case "training":
            steps = range(saved + 1, last + 1)[:_STEPS_BEYOND]
            return Moment(chance.choice(steps), chance.uniform(0, _AFTER_A_STEP_S))
        case "ending":
            return Moment(last, chance.uniform(0, known.ending_s))
    return None


def draw_line(
    chance: random.Random, saved: int, known: Known
) -> tuple[str, str, int, int]:
    """What makes a start die at a line that it will come to, most likely."""
    file, line, times = chance.choice(known.lines)
    left = (faults_runs.STEPS - saved) / faults_runs.STEPS
    times = chance.randint(1, max(math.ceil(left * times), 1))
    return "tests.faults.deaths:die_at", file, line, times


def _place(first: tuple[Any, ...]) -> dict[str, Any]:
    """Returns the line and the how-manieth time, of what `draw_line` returns."""
    if not first:
        return {}
    _, file, line, times = first
    return {"line": [str(pathlib.Path(file).relative_to(ROOT)), line, times]}


def _program() -> starts.Program:
    return starts.Program(
        "jmoe.commands.train", imports=IMPORTS, environment=ENVIRONMENT
    )


def _know(
    program: starts.Program, command: list[str], directory: pathlib.Path
) -> Known:
    """Runs twice: once to compile and to count lines, once for the time it takes."""
    files = [str(path) for pattern in LINES_OF for path in ROOT.glob(pattern)]
    counted = directory / "lines.json"
    count = ("tests.faults.deaths:count_lines", files, str(counted))
    for name, first in {"first": count, "unharmed": ()}.items():
        began, out = time.time(), directory / f"{name}.out"
        arguments = [*command, f"--workdir={directory / name}"]
        if program.start(arguments, out, *first).wait(_PATIENCE_S):
            raise RuntimeError(f"A run failed unharmed: {out.read_text()[-_TAIL:]}")
        ended = time.time()
    rows = list(run_files.read_rows(directory / "unharmed" / run_files.METRICS))
    lines = [tuple(row) for row in json.loads(counted.read_text())]
    return Known(rows[0]["time"] - began, ended - rows[-1]["time"], lines)
