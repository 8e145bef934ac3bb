"""What a data configuration refuses."""

import dataclasses
import json

import pytest

from jmoe.config.data import DataConfig, SourceConfig


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(ValueError, match=r"weight=.* of 'a\.txt'"):
        SourceConfig(path="a.txt", weight=weight)


def test_an_unknown_builtin_domain_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'builtin:music'.*'builtin:code'"):
        SourceConfig(path="builtin:music")


@pytest.mark.parametrize("fields", [{"path": ""}, {"text_field": ""}])
def test_empty_names_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=''"):
        SourceConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"sources": ()},
        {"tokenizer": ""},
        {"sequence_length": 0},
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"seed": -1},
    ],
)
def test_an_impossible_field_is_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        DataConfig(**fields)


def test_the_record_survives_json():
    cfg = DataConfig(sequence_length=64)
    values = json.loads(json.dumps(dataclasses.asdict(cfg)))
    sources = tuple(SourceConfig(**source) for source in values.pop("sources"))
    assert DataConfig(sources=sources, **values) == cfg
