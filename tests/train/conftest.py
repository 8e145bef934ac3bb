"""The smallest run, on a small text of its own."""

import dataclasses
import pathlib
import runpy

import pytest

from jmoe.config import RunConfig, SourceConfig

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
