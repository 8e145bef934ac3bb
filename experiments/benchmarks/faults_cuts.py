"""A run whose machine loses power, at any moment, resumed from what is on the disk.

`tests/faults/power.py` says what a cut may leave. From every such image some whole
checkpoint must be read; from some, drawn at random, the run goes on until it is done.
"""

import contextlib
import io
import pathlib
import random
import shutil
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import absl.logging
import jax

from experiments.benchmarks import faults_runs
from experiments.benchmarks.report import Figure
from experiments.benchmarks.workers import Tasks
from jmoe.checkpoint.store import Store
from jmoe.config import RunConfig
from jmoe.train import loop, runtime, saving
from jmoe.train.trained import CHECKPOINTS
from tests.faults import power

_CALLS_A_CUT = 7  # of the file system
_RUN = "run"


def tasks(directory: pathlib.Path, cuts: int, seed: int) -> Tasks:
    """`measure`, in a process of its own."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    runtime.step_after_step()
    runtime.keep_compiled(directory.parent / "data" / "cache" / runtime.COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def task() -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()):  # of many runs
            return measure(directory, cuts, seed)

    return {"measure": task}


def measure(directory: pathlib.Path, cuts: int, seed: int) -> dict[str, Any]:
    """Returns how many images there are, and what is wrong with which."""
    run = faults_runs.tiny_run(directory.parent / "data")
    loop.train(run, directory / "unharmed" / _RUN)
    want = faults_runs.read_end(directory / "unharmed" / _RUN)
    images = list(watched(run, directory / "watched").images)
    wrong = {}
    for number, image in enumerate(images):
        with _restored(image, directory / "image") as workdir:
            wrong[number] = list(unreadable(workdir, image.promised, want))
    chosen = sorted(random.Random(seed).sample(range(len(images)), cuts))
    for number in chosen:
        with _restored(images[number], directory / "image") as workdir:
            loop.train(run, workdir)
            end = faults_runs.read_end(workdir)
            wrong[number] += faults_runs.differences(end, want)
    return {
        "images": len(images),
        "resumed": chosen,
        "wrong": {number: lines for number, lines in wrong.items() if lines},
    }


def figures(result: Mapping[str, Any], cuts: int) -> Iterator[Figure]:
    yield Figure(
        name="power cuts resumed from",
        value=len(result["resumed"]),
        unit="",
        definition=f"of {result['images']} different disks that a cut can leave at "
        f"every {_CALLS_A_CUT}th call of the file system",
        at_least=cuts,
    )
    yield Figure(
        name="power cuts that lose a checkpoint or end otherwise",
        value=len(result["wrong"]),
        unit="",
        definition="of all disks, those where the newest checkpoint that was on the "
        "disk for sure, or a newer one, isn't read as it was written; and of those "
        "resumed from, where what is left at the end differs by a bit from that of a "
        "run without a cut",
        at_most=0,
    )


def watched(run: RunConfig, root: pathlib.Path) -> power.Disk:
    """The whole run on a disk that is watched; promised is its newest checkpoint."""
    root.mkdir()
    with power.Disk(root, every=_CALLS_A_CUT) as disk:

        class Promising(Store):
            def wait(self) -> None:
                super().wait()
                disk.promise(self.latest_step())

        with mock.patch.object(saving, "Store", Promising):
            loop.train(run, root / _RUN)
    return disk


@contextlib.contextmanager
def _restored(image: power.Image, directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """The workdir of the run on the disk that the cut left."""
    image.restore(directory)
    yield directory / _RUN
    shutil.rmtree(directory)


def unreadable(
    workdir: pathlib.Path, promised: int | None, want: faults_runs.End
) -> Iterator[str]:
    """Whether the newest whole checkpoint isn't what was promised, or isn't right."""
    with Store(workdir / CHECKPOINTS) as store:
        try:
            step = store.latest_step()
        except FileNotFoundError as error:
            yield str(error)
            return
    if (step or 0) < (promised or 0):
        yield f"checkpoint {promised} is lost, {step} is there"
    if step is not None:
        got = faults_runs.read_checkpoint(workdir, step)
        if step in want.checkpoints:
            yield from faults_runs.checkpoint_differences(
                step, got, want.checkpoints[step]
            )
