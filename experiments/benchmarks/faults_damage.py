"""Checkpoints that something has happened to, each read as a run that goes on does.

Two checkpoints of a run, the newer one harmed in one of the ways that
`tests/faults/damage.py` knows: what a run then goes on from must be the newer one as it
was written, where no harm was done to what it holds; or the older one, and said so. If
it is neither, the damage was accepted; if it is an error, the run was refused although
it had a whole checkpoint.
"""

import contextlib
import functools
import io
import logging
import pathlib
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import absl.logging
import jax
import numpy as np

from experiments.benchmarks import faults_runs
from experiments.benchmarks.report import Figure
from experiments.benchmarks.workers import Tasks
from jmoe.checkpoint import manifest
from jmoe.checkpoint.store import Store
from jmoe.config import RunConfig
from jmoe.nn.model import Transformer
from jmoe.train import layout as layouts
from jmoe.train import loop, resume, runtime
from jmoe.train.inputs import open_inputs
from jmoe.train.optimizer import make_optimizer
from jmoe.train.state import make_state
from jmoe.train.trained import CHECKPOINTS
from tests.faults import damage

# What may become of a damaged checkpoint. The last three must not be.
UNHARMED = "as it was written"
OLDER = "older one instead"
SILENT = "older one instead, in silence"
ACCEPTED = "accepted"
REFUSED = "refused"
BAD = (SILENT, ACCEPTED, REFUSED)

_FORGED = 50


def tasks(directory: pathlib.Path, cases: int, seed: int) -> Tasks:
    """`measure`, in a process of its own."""
    runtime.keep_compiled(directory.parent / "data" / "cache" / runtime.COMPILED)
    absl.logging.get_absl_logger().propagate = False  # hundreds of warnings

    def task() -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()):
            return measure(directory, cases, seed)

    return {"measure": task}


def measure(directory: pathlib.Path, cases: int, seed: int) -> dict[str, Any]:
    """Returns counts of what became of each kind, and the cases that went wrong."""
    run = faults_runs.tiny_run(directory.parent / "data")
    workdir = directory / "unharmed"
    loop.train(run, workdir)
    older, newer = faults_runs.steps_saved(workdir)[-2:]
    shutil.rmtree(directory / "pair", ignore_errors=True)
    for step in (older, newer):
        shutil.copytree(
            workdir / CHECKPOINTS / str(step), directory / "pair" / str(step)
        )
    trial = Trial(run, directory, older, newer)
    counts: dict[str, dict[str, int]] = {}
    wrong = []
    forged = min(cases, _FORGED)
    for table, number in ((damage.KINDS, cases), (damage.FORGED, forged)):
        for case in range(number):
            kind = list(table)[case % len(table)]
            outcome, said = trial(table[kind], random.Random(f"{seed} {case}"))
            counted = counts.setdefault(kind, {})
            counted[outcome] = counted.get(outcome, 0) + 1
            if table is damage.KINDS and outcome in BAD:
                wrong.append(f"{kind}: {said}: {outcome}")
    return {"counts": counts, "wrong": wrong}


class Trial:
    """Harms a copy of the pair, and sees what a run would go on from."""

    def __init__(self, run: RunConfig, directory: pathlib.Path, older: int, newer: int):
        self._pair, self._copy = directory / "pair", directory / "copy"
        self._older, self._newer = older, newer
        model = Transformer(run.model)
        layout = layouts.make_layout(model, layouts.run_mesh(run.mesh))
        optimizer = make_optimizer(run.optimizer, run.horizon, layout)
        make = functools.partial(make_state, model, optimizer, run.train.seed)
        loader = open_inputs(run, layout.mesh, None).loader
        self._begin = functools.partial(resume.begin, make, layout)
        self._loader = loader
        self._want = {}
        for step in (older, newer):
            got, _ = self._resume(harm=None if step == newer else self._drop_newer)
            self._want[step] = got

    def __call__(self, harm: damage.Harm, chance: random.Random) -> tuple[str, str]:
        """What became of it, and what was done."""
        said = []

        def act(found: damage.Checkpoints) -> None:
            said.append(harm(found, chance))

        try:
            got, warned = self._resume(act)
        except Exception as error:
            return REFUSED, f"{said[0]}: {type(error).__name__}: {error}"
        if got == self._want[self._newer]:
            return UNHARMED, said[0]
        if got == self._want[self._older]:
            return OLDER if warned else SILENT, said[0]
        return ACCEPTED, said[0]

    def _drop_newer(self, found: damage.Checkpoints) -> None:
        shutil.rmtree(found.newer)

    def _resume(
        self, harm: Callable[[damage.Checkpoints], None] | None
    ) -> tuple[dict[str, Any], bool]:
        """All that the run would go on with, and whether there was a warning."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._pair, self._copy)
        if harm is not None:
            names = (str(self._newer), str(self._older))
            harm(damage.Checkpoints(*(self._copy / name for name in names)))
        warnings = _Warnings()
        absl.logging.get_absl_logger().addHandler(warnings)
        try:
            with Store(self._copy) as store:
                state, step, guard = self._begin(store, self._loader)
        finally:
            absl.logging.get_absl_logger().removeHandler(warnings)
        arrays = manifest.flatten(jax.device_get(state))
        digests = {n: faults_runs.digest(np.asarray(x)) for n, x in arrays.items()}
        position = self._loader.get_state()
        got = {"step": step, "guard": guard, "position": position, "arrays": digests}
        return got, any("Passed over" in text for text in warnings.texts)


class _Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def figures(result: Mapping[str, Any], cases: int) -> Iterator[Figure]:
    total, forged = Counter(), Counter()
    for kind, counts in result["counts"].items():
        (total if kind in damage.KINDS else forged).update(counts)
    definitions = {
        ACCEPTED: "the run would go on with an array, a position or a step that is "
        "neither the newer nor the older checkpoint's",
        REFUSED: "an error, although the older checkpoint is whole",
        SILENT: "the run would go on from the older checkpoint without saying why",
    }
    yield Figure(
        name="damaged checkpoints",
        value=sum(total.values()),
        unit="",
        definition=f"the newer of two, in {len(damage.KINDS)} ways; then resumed from",
        at_least=cases,
    )
    for outcome, definition in definitions.items():
        yield Figure(
            name=f"damaged, {outcome}",
            value=total[outcome],
            unit="",
            definition=definition,
            at_most=0,
        )
    yield Figure(
        name=f"damaged, {UNHARMED}",
        value=total[UNHARMED],
        unit="",
        definition="what the checkpoint holds is not in the bytes that were changed, "
        "such as those of a file that was added",
    )
    yield Figure(
        name=f"forged, {ACCEPTED}",
        value=forged[ACCEPTED],
        unit="",
        definition=f"of {sum(forged.values())} manifests that were edited and their "
        "sums made again: CRC-32 is against accidents. A step is refused all the "
        "same, since the state has it too; a position is not",
    )
