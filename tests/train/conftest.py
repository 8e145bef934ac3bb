"""The smallest run, on a small text of its own; a smaller one, compiled once."""

import dataclasses
import pathlib
import runpy

import pytest

from jmoe.config import RunConfig, SourceConfig, override
from jmoe.train import loop, stretch

EXPERIMENT = pathlib.Path(__file__).parents[1] / "smallest_run.py"


@pytest.fixture(scope="session")
def smallest(tmp_path_factory) -> RunConfig:
    directory = tmp_path_factory.mktemp("smallest")
    documents = (f"The square of {i} is {i * i}. " * 3 for i in range(80))
    text = directory / "squares.txt"
    text.write_text("<|endoftext|>".join(documents))
    run = runpy.run_path(str(EXPERIMENT))["get_config"]()
    data = dataclasses.replace(
        run.data,
        sources=(SourceConfig(path=str(text)),),
        cache_dir=str(directory / "cache"),
    )
    return dataclasses.replace(run, data=data)


@pytest.fixture(scope="session")
def quick(smallest) -> RunConfig:
    """A run of 20 steps that is quick to compile, a checkpoint every 4 steps."""
    model = ["num_layers=1", "num_dense_layers=0", "mtp_depth=0"]
    train = ["steps=20", "ramp_start=none", "batch_size=4", "checkpoint_every=4"]
    train += ["eval_every=100", "log_every=10"]
    fields = [f"model.{field}" for field in model] + [
        f"train.{field}" for field in train
    ]
    return override(smallest, [*fields, "schedule.steps=40"])


@pytest.fixture(scope="session")
def compiled_once():
    """`stretch.compile_steps`, which gives the same programs to all such runs."""
    made = {}
    compile_steps = stretch.compile_steps

    def shared(model, optimizer, run, layout):
        key = run.model, run.optimizer, run.horizon, run.train.skips_steps
        if key not in made:
            made[key] = compile_steps(model, optimizer, run, layout)
        return made[key]

    return shared


@pytest.fixture(scope="module")
def quickly(compiled_once):
    """Runs of this module share programs, and draw no report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretch, "compile_steps", compiled_once)
        patch.setattr(loop.report, "write_report", lambda _: None)
        yield
