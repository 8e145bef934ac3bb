"""Rotary embeddings: a spelling means what transformers takes it for, or nothing."""

import copy

import pytest

from jmoe.config.model import ModelConfig
from jmoe.families import from_hf, to_hf

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
TYPED = YARN | {"type": "yarn"}
NEWER = YARN | {"rope_type": "yarn", "rope_theta": 10000}
BASE = to_hf(ModelConfig.preset("v3")) | {"rope_theta": 10000, "rope_scaling": TYPED}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {}, "rope_parameters": NEWER},
        {"rope_parameters": NEWER},
        {"rope_theta": None, "rope_scaling": TYPED | {"rope_theta": 5e5}},
        {"rope_theta": None, "rope_scaling": None},
        {"rope_scaling": TYPED | {"rope_type": "yarn", "truncate": True}},
        {"partial_rotary_factor": None},
        {"original_max_position_embeddings": 4096},
    ],
    ids=str,
)
def test_rotary_embeddings_are_read_as_transformers_reads_them(change):
    transformers = pytest.importorskip("transformers")
    given = BASE | change
    ours = from_hf(copy.deepcopy(given)).attention
    theirs = transformers.DeepseekV3Config(**copy.deepcopy(given)).rope_parameters
    assert (theirs["rope_theta"] or 10_000) == ours.rope_theta
    assert theirs["rope_type"] == ("yarn" if ours.yarn else "default")
    if ours.yarn:
        positions = theirs["original_max_position_embeddings"]
        assert (theirs["factor"], positions) == (40, ours.yarn.original_positions)


def test_a_type_that_is_null_in_one_spelling_is_that_of_the_other():
    given = BASE | {"rope_scaling": TYPED | {"rope_type": None}}
    assert from_hf(given).attention == from_hf(BASE).attention


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling.rope_type='linear' 'yarn'",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' object"),
        (
            {"rope_parameters": {"rope_type": "yarn", "truncate": False}},
            "rope_parameters.truncate=False must be True",
        ),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta=10000 =5.0 disagree"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_scaling= {} disagree"),
        (
            {"rope_scaling": TYPED | {"rope_type": "default"}},
            "rope_scaling.rope_type='default' rope_scaling.type='yarn' disagree",
        ),
        (
            {"rope_scaling": YARN | {"type": "default", "rope_type": "yarn"}},
            "rope_scaling.rope_type='yarn' rope_scaling.type='default' disagree",
        ),
        ({"rope_scaling": YARN}, "rope_scaling.factor=40 ignored 'default'"),
        (
            {"rope_scaling": None, "rope_parameters": {"full_attention": NEWER}},
            "rope_parameters.full_attention={ ignored 'default'",
        ),
        (
            {"rope_scaling": TYPED | {"low_freq_factor": 1.0}},
            "rope_scaling.low_freq_factor=1.0 ignored 'yarn'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 must be 1 "),
        (
            {"original_max_position_embeddings": 2048},
            "original_max_position_embeddings=2048 =4096 disagree",
        ),
    ],
    ids=str,
)
def test_what_would_become_other_embeddings_in_silence_is_refused(change, said):
    with pytest.raises(ValueError) as error:
        from_hf(BASE | change)
    missing = [word for word in said.split() if word not in str(error.value)]
    assert not missing, str(error.value)
