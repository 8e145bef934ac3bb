"""Runs from start to end: what they left on disk, and programs that they share."""

import contextlib
import functools
import pathlib
from collections.abc import Callable
from unittest import mock

import jax
import numpy as np

from jmoe.checkpoint.store import Store
from jmoe.config import RunConfig
from jmoe.monitor import run_files
from jmoe.nn.model import Transformer
from jmoe.train import layout as layouts
from jmoe.train import stretch
from jmoe.train.optimizer import make_optimizer
from jmoe.train.state import make_state
from jmoe.train.trained import CHECKPOINTS

# What of `train` a run's loop reads, and no step.
LOOPS = {
    *("steps", "log_every", "eval_every", "eval_batches", "signal_every"),
    *("checkpoint_every", "checkpoint_minutes", "reassign_every", "reassign_above"),
    *("keep_checkpoints", "keep_best", "keep_every"),
    *("on_nonfinite", "on_spike", "spike_score", "max_skipped", "max_roll_backs"),
}
TIMES = {"time", "tokens_per_second", "step_seconds"}


def rows(workdir: pathlib.Path) -> list[dict]:
    """What was logged, without what depends on the clock."""
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in run_files.read_rows(workdir / run_files.METRICS)
    ]


def last_state(run: RunConfig, workdir: pathlib.Path):
    model = Transformer(run.model)
    layout = layouts.make_layout(model, layouts.run_mesh(run.mesh))
    optimizer = make_optimizer(run.optimizer, run.horizon, layout)
    make = jax.eval_shape(lambda: make_state(model, optimizer, 0))
    with Store(workdir / CHECKPOINTS) as store:
        return jax.device_get(store.restore(make))


def assert_same_end(run: RunConfig, got: pathlib.Path, want: pathlib.Path) -> None:
    """To the bit: the state, the loader's position, and all that was logged."""
    got_state, want_state = last_state(run, got), last_state(run, want)
    same = jax.tree.map(np.array_equal, got_state, want_state)
    assert all(jax.tree.leaves(same)), same
    assert rows(got) == rows(want)
    balance = [
        list(run_files.read_rows(workdir / run_files.BALANCE))
        for workdir in (got, want)
    ]
    assert balance[0] == balance[1]


def sharing_programs() -> Callable[[], contextlib.AbstractContextManager]:
    """Returns a context in which runs that take the same steps share their programs."""
    made = {}
    compile_steps = stretch.compile_steps

    def compile_once(model, optimizer, run, layout):
        of_steps = {**vars(run.train), "skips": run.train.skips_steps}
        of_steps = {name: of_steps[name] for name in of_steps.keys() - LOOPS}
        others = {**vars(run), "train": frozenset(of_steps.items())}
        others |= {"schedule": run.horizon, "name": None, "monitor": None}
        key = frozenset(others.items())
        if key not in made:
            made[key] = compile_steps(model, optimizer, run, layout)
        return made[key]

    return functools.partial(mock.patch.object, stretch, "compile_steps", compile_once)
