"""config.json of every family: what comes in, what goes out, and what is refused."""

import copy
import dataclasses
import json

import pytest

from jmoe.config import ModelConfig, records
from jmoe.config.presets import MODELS
from jmoe.families import FAMILIES, family_of, from_hf, lookup, to_hf
from jmoe.families.family import value_of
from tests.families.cases import PUBLISHED, TINY
from tests.parity import architecture

each_family = pytest.mark.parametrize("name", FAMILIES)
each_file = pytest.mark.parametrize("name", PUBLISHED)

# What a file says nothing about, or otherwise than the paper.
UNSAID = {
    "remat": "none",
    "init_std": 0.02,
    "moe.router.auxiliary_loss": "none",
    "moe.router.auxiliary_weight": 0.0,
}


OTHER = {
    "sigmoid": "softmax",
    "softmax": "sigmoid",
    "max": "top2_sum",
    "top2_sum": "max",
    "halves": "interleaved",
}


def changed(cfg, **values):
    return records.override(cfg, [f"{path}={v!r}" for path, v in values.items()])


def shape(cfg):
    return dataclasses.replace(cfg, hf_extras="{}")


def refused(read, *words):
    with pytest.raises(ValueError) as error:
        read()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)


def test_every_family_has_a_tiny_model_here():
    assert TINY.keys() == FAMILIES.keys()
    assert all(family_of(cfg).model_type == name for name, cfg in TINY.items())


@each_file
def test_a_published_file_is_the_preset(name):
    got = from_hf(copy.deepcopy(PUBLISHED[name]))
    assert shape(got) == changed(ModelConfig.preset(name), **UNSAID)


@each_file
def test_a_published_file_comes_back_with_all_its_keys(name):
    got = to_hf(from_hf(copy.deepcopy(PUBLISHED[name])))
    assert {key: got[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_survives_the_round_trip(name):
    cfg = ModelConfig.preset(name)
    assert from_hf(json.loads(json.dumps(to_hf(cfg)))) == cfg


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it_and_means_the_same(name):
    cfg = ModelConfig.preset(name)
    theirs = architecture(cfg).config_class(**to_hf(cfg)).to_dict() | {
        "model_type": cfg.family
    }
    assert shape(from_hf(json.loads(json.dumps(theirs)))) == cfg


@each_family
def test_what_a_file_leaves_out_is_what_transformers_takes_it_for(name):
    optional = ("initializer_range", "rope_theta", "tie_word_embeddings")
    optional += ("attention_bias", "partial_rotary_factor", "use_qk_norm")
    file = {k: v for k, v in to_hf(TINY[name]).items() if k not in optional}
    theirs = architecture(TINY[name]).config_class(**file).to_dict() | {
        "model_type": name
    }
    assert shape(from_hf(json.loads(json.dumps(theirs)))) == shape(from_hf(file))


@each_family
def test_a_field_that_has_no_key_is_kept_beside_the_others(name):
    cfg = changed(TINY[name], **{"remat": "block", "layer_loop": "scan"})
    assert to_hf(cfg)["jmoe"] == {"remat": "block"}
    assert from_hf(to_hf(cfg)) == cfg


@each_family
def test_a_field_changed_later_wins_over_the_file(name):
    file = to_hf(TINY[name]) | {"bos_token_id": 5, "dtype": "float32"}
    cfg = changed(from_hf(file), dtype="bfloat16", hidden_dim=64)
    again = from_hf(to_hf(cfg))
    assert shape(again) == shape(cfg)
    assert json.loads(again.hf_extras) == {"bos_token_id": 5}


@each_family
def test_all_missing_keys_are_listed_at_once(name):
    file = to_hf(TINY[name])
    del file["hidden_size"], file["num_experts_per_tok"]
    refused(lambda: from_hf(file), "The config lacks hidden_size, num_experts_per_tok.")


@each_family
def test_an_option_that_the_model_does_not_have_is_refused_by_name(name):
    family, file = lookup(name), to_hf(TINY[name])
    options = {**family.constants, **{k: v[0] for k, v in family.accepted.items()}}
    assert options
    for key in options:
        refused(
            lambda key=key: from_hf(file | {key: "odd"}), f"{key}='odd' ", "must be"
        )


@each_family
def test_what_the_files_cannot_say_is_refused_on_the_way_out(name):
    for field, value in lookup(name).fields.items():
        other = OTHER[value] if isinstance(value, str) else type(value)(value + 1)
        other = not value if isinstance(value, bool) else other
        cfg = changed(TINY[name], **{field: other})
        refused(
            lambda cfg=cfg: to_hf(cfg), f"{name!r} has {field}={value!r}", f"{other!r}"
        )


WITH_MSCALE = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
}


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' greedy"),
        ("deepseek_v2", {"topk_method": "greedy"}, "'greedy' no groups n_group=4"),
        ("deepseek_v2", {"num_key_value_heads": 1}, "num_key_value_heads=1 latent"),
        ("glm4_moe", {"rope_scaling": WITH_MSCALE}, "rope_scaling.mscale=1.0 null"),
        ("glm4_moe", {"head_dim": "12"}, "head_dim='12' int"),
        (
            "dots1",
            {"layer_types": ["sliding_attention"]},
            "layer_types sliding_attention",
        ),
        ("qwen3_moe", {"num_local_experts": 4}, "num_experts=8 num_local_experts=4"),
    ],
    ids=str,
)
def test_what_only_some_families_could_say_is_refused(name, change, said):
    refused(lambda: from_hf(to_hf(TINY[name]) | change), *said.split())


@pytest.mark.parametrize(
    "name, field, value, only",
    [
        ("glm4_moe", "attention.qk_norm_eps", 1e-3, 1e-6),
        ("dots1", "attention.qk_norm_eps", None, 1e-6),
        ("qwen3_moe", "attention.qk_norm_eps", 1e-5, 1e-6),
        ("qwen3_moe", "attention.yarn.mscale", 1.0, None),
        ("dots1", "attention.rope_dim", 6, 12),
        ("qwen3_moe", "attention.rope_dim", 6, 12),
    ],
)
def test_what_follows_from_other_keys_is_not_written_otherwise(
    name, field, value, only
):
    cfg = changed(TINY[name], **{field: value})
    refused(
        lambda: to_hf(cfg), f"{name!r} has {field}={only!r}", f"can't say {value!r}"
    )


@each_family
def test_another_architecture_is_refused(name):
    file = to_hf(TINY[name]) | {"architectures": ["LlamaForCausalLM"]}
    refused(lambda: from_hf(file), "LlamaForCausalLM", FAMILIES[name].architecture)


def test_a_family_that_is_not_known_is_refused_naming_those_that_are():
    guide = 'docs/how_to_add.md, "Add a model family"'
    file = to_hf(TINY["deepseek_v3"]) | {"model_type": "llama"}
    refused(lambda: from_hf(file), "model_type='llama'", *FAMILIES, guide)
    cfg = changed(TINY["deepseek_v3"], family="llama")
    refused(lambda: to_hf(cfg), "family='llama'", *FAMILIES, guide)
    del file["model_type"]
    refused(lambda: from_hf(file), "lacks model_type", *FAMILIES)


def test_a_model_of_another_family_is_told_which_could_describe_it():
    cfg = changed(TINY["deepseek_v3"], family="deepseek_v2")
    refused(lambda: to_hf(cfg), "mtp_depth=0", "can describe the model: deepseek_v3")


@each_family
@pytest.mark.parametrize(
    "field, value, only",
    [
        ("kind", "expert_choice", "token_choice"),
        ("kind", "hash", "token_choice"),
        ("hash_layers", 1, 0),
        ("score", "sqrt_softplus", None),
    ],
)
def test_experts_that_others_would_choose_otherwise_are_refused(
    name, field, value, only
):
    path = f"moe.router.{field}"
    groups = {"moe.router.num_groups": 1, "moe.router.groups_per_token": 1}
    cfg = changed(TINY[name], **{**groups, path: value})
    only = value_of(TINY[name], path) if only is None else only
    refused(lambda: to_hf(cfg), f"{name!r} has {path}={only!r}", f"say {value!r}")


@each_family
def test_noise_in_training_changes_nothing_that_others_compute(name):
    router = {"moe.router.kind": "noisy", "moe.router.noise_std": 0.5}
    cfg = changed(TINY[name], **router)
    assert from_hf(to_hf(cfg)) == cfg
