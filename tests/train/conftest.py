"""The smallest run, on a small text of its own; a smaller one, compiled once."""

import dataclasses
import pathlib
import runpy

import pytest

from jmoe.config import RunConfig, SourceConfig, override
from jmoe.train import loop

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


@pytest.fixture(scope="module")
def quickly(sharing_programs):
    """Runs of this module share programs, and draw no report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.report, "write_report", lambda _: None)
        yield
