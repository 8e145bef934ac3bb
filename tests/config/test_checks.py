"""Numbers are neither infinite nor NaN, and paths are of this machine."""

import dataclasses
import math
import typing

import pytest

from jmoe.config import checks, records
from jmoe.config.serve import ServeConfig
from tests.plain_run import plain_run

RUN = records.override(
    plain_run(),
    [
        "model.attention.yarn={'factor': 4.0, 'original_positions': 256}",
        "model.moe.exchange.capacity_factor=1.25",
    ],
)
SERVE = records.override(
    ServeConfig(),
    [
        "engine.expert_parallel=true",
        "engine.placement={'redundant_experts': 32}",
        "engine.cache_gib=4.0",
    ],
)
INFINITE = {"optimizer.clip_norm"}  # no clipping


def floats(hint, value, path=""):
    """The paths to all fields of a record that may hold a float."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            yield from floats(hints[field.name], inner, f"{path}.{field.name}")
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield from floats(typing.get_args(hint)[0], inner, f"{path}.{i}")
    elif float in (hint, *typing.get_args(hint)):
        yield path.removeprefix(".")


FIELDS = [
    pytest.param(record, path, id=path)
    for record in (RUN, SERVE)
    for path in floats(type(record), record)
]


def test_the_fields_are_found():
    paths = {field.id for field in FIELDS}
    assert len(paths) > 30
    assert paths >= INFINITE | {"model.attention.yarn.mscale", "data.sources.2.weight"}


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("record", "path"), FIELDS)
def test_a_number_that_is_infinite_or_nan_is_refused_by_name(record, path, number):
    if path in INFINITE and number == math.inf:
        return
    *_, name = (word for word in path.split(".") if not word.isdecimal())
    with pytest.raises(ValueError, match=rf"\b{name}=.*({number}|must rise)"):
        records.override(record, [f"{path}={float_text(number)}"])


def float_text(number: float) -> str:
    """Writes a number as `--set` reads it: -inf is no literal, one too large is."""
    return "-1e999" if number == -math.inf else str(number)


@pytest.mark.parametrize("text", ["gs://bucket/run", "", "nul\0", "latin1\udcff"])
def test_what_is_no_path_of_this_machine_is_refused_by_name(text):
    with pytest.raises(ValueError, match="workdir=.* must be a path of this machine"):
        checks.local_path("workdir", text)


def test_a_home_is_found_or_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checks.local_path("workdir", "~/run/") == tmp_path / "run"
    with pytest.raises(ValueError, match="out='~nobody_here/x'.* home"):
        checks.local_path("out", "~nobody_here/x")
