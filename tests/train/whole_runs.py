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
        train = run.train
        of_losses = train.mtp_weight, train.loss_chunk, run.data, run.precision
        of_biases = train.bias_rate, train.skips_steps, train.seed
        of_mesh = run.mesh, run.pipeline
        of_schedules = run.optimizer, run.horizon
        key = run.model, of_losses, of_biases, of_mesh, of_schedules
        if key not in made:
            made[key] = compile_steps(model, optimizer, run, layout)
        return made[key]

    return functools.partial(mock.patch.object, stretch, "compile_steps", compile_once)
