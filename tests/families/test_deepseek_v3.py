"""DeepSeek-V3's config.json: what comes in, what goes out, and what is refused."""

import copy
import dataclasses
import json

import pytest

from jmoe.config import records
from jmoe.config.model import ModelConfig
from jmoe.families import from_hf, to_hf

V3_FILE = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"],
  "attention_bias": false,
  "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
  "bos_token_id": 0,
  "eos_token_id": 1,
  "ep_size": 1,
  "first_k_dense_replace": 3,
  "hidden_act": "silu",
  "hidden_size": 7168,
  "initializer_range": 0.02,
  "intermediate_size": 18432,
  "kv_lora_rank": 512,
  "max_position_embeddings": 163840,
  "model_type": "deepseek_v3",
  "moe_intermediate_size": 2048,
  "moe_layer_freq": 1,
  "n_group": 8,
  "n_routed_experts": 256,
  "n_shared_experts": 1,
  "norm_topk_prob": true,
  "num_attention_heads": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 61,
  "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1,
  "q_lora_rank": 1536,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
    "quant_method": "fp8", "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn"
  },
  "rope_theta": 10000,
  "routed_scaling_factor": 2.5,
  "scoring_func": "sigmoid",
  "tie_word_embeddings": false,
  "topk_group": 4,
  "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1",
  "use_cache": true,
  "v_head_dim": 128,
  "vocab_size": 129280
}""")

V2_LITE_FILE = V3_FILE | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rope_scaling": V3_FILE["rope_scaling"]
    | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "vocab_size": 102400,
}


def without(hf, *keys):
    return {key: value for key, value in hf.items() if key not in keys}


# As transformers 5 saves it: no scoring_func, no topk_method, one dict for rotations.
NEWER_FILE = without(
    V3_FILE, "rope_scaling", "rope_theta", "scoring_func", "topk_method", "torch_dtype"
) | {
    "dtype": "bfloat16",
    "head_dim": 64,
    "qk_head_dim": 192,
    "rope_interleave": True,
    "rope_parameters": {
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "rope_theta": 10000,
        "rope_type": "yarn",
        "type": "yarn",
    },
}

# Legal, yet nothing that we would write.
ODD_FILE = V2_LITE_FILE | {
    "head_dim": 192,
    "jmoe": {"layer_loop": "scan", "remat": "block"},
    "num_key_value_heads": None,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "scoring_func": None,
    "topk_method": "group_limited_greedy",
    "torch_dtype": None,
}

FILES = {
    "v3": V3_FILE,
    "v2_lite": V2_LITE_FILE,
    "transformers_5": NEWER_FILE,
    "odd": ODD_FILE,
}

CHANGES = {  # of every field, from what `tiny_with_yarn` has
    "vocab_size": 4096,
    "hidden_dim": 256,
    "num_layers": 6,
    "num_dense_layers": 2,
    "dense_mlp_dim": 512,
    "max_positions": 2048,
    "mtp_depth": 0,
    "tie_embeddings": True,
    "norm_eps": 1e-5,
    "init_std": 0.006,
    "dtype": "bfloat16",
    "remat": "save_dots",
    "layer_loop": "unroll",
    "hf_extras": '{"bos_token_id": 5}',
    "attention.num_heads": 8,
    "attention.query_latent_dim": None,
    "attention.kv_latent_dim": 32,
    "attention.nope_dim": 16,
    "attention.rope_dim": 8,
    "attention.value_dim": 16,
    "attention.rope_theta": 5e5,
    "attention.yarn.factor": 8.5,
    "attention.yarn.original_positions": 128,
    "attention.yarn.beta_fast": 16.0,
    "attention.yarn.beta_slow": 2.0,
    "attention.yarn.mscale": None,
    "attention.yarn.mscale_all_dim": 0.0,
    "attention.latent_norm_eps": 1e-5,
    "attention.block_size": 64,
    "moe.router.num_experts": 64,
    "moe.router.top_k": 2,
    "moe.router.num_groups": 2,
    "moe.router.groups_per_token": 1,
    "moe.router.score": "softmax",
    "moe.router.group_score": "max",
    "moe.router.normalize_gates": False,
    "moe.router.gate_scale": 2.5,
    "moe.router.update_rule": "quantile",
    "moe.router.auxiliary_loss": "switch",
    "moe.router.auxiliary_weight": 0.01,
    "moe.router.z_loss_weight": 1e-3,
    "moe.expert_mlp_dim": 32,
    "moe.num_shared_experts": 0,
    "moe.backend": "blocks",
    "moe.remat": "activations",
    "moe.exchange.backend": "ragged",
    "moe.exchange.capacity_factor": 1.5,
    "moe.exchange.drop_order": "position",
    "moe.exchange.lend_above": 0.1,
    "moe.exchange.node_size": 8,
    "moe.exchange.slots": 2,
    "moe.exchange.chunks": 2,
    "moe.exchange.dispatch_dtype": "float8_e4m3fn",
}
UNCHANGEABLE = {"family", "attention.kind", "moe.kind"}  # there is only one
ELSEWHERE = {"moe.router.kind", "moe.router.noise_std", "moe.router.hash_layers"}


YARN = {"factor": 4.0, "original_positions": 256}


def tiny_with_yarn():
    return changed(ModelConfig.preset("tiny"), **{"attention.yarn": YARN})


def changed(cfg, **values):
    return records.override(cfg, [f"{path}={v!r}" for path, v in values.items()])


def leaves(record, prefix=""):
    """The dotted paths of all fields that aren't records."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def shape(cfg):
    return dataclasses.replace(cfg, hf_extras="{}")


def test_both_spellings_of_rope_and_dtype_mean_the_same():
    assert shape(from_hf(NEWER_FILE)) == shape(from_hf(V3_FILE))


@pytest.mark.parametrize("path", CHANGES)
def test_a_changed_field_survives_the_round_trip(path):
    cfg = changed(tiny_with_yarn(), **{path: CHANGES[path]})
    assert cfg != tiny_with_yarn()
    assert from_hf(json.loads(json.dumps(to_hf(cfg)))) == cfg


def test_the_changes_cover_every_field():
    assert set(leaves(tiny_with_yarn())) - UNCHANGEABLE - ELSEWHERE == set(CHANGES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_back_with_all_its_keys(name):
    given = FILES[name]
    got = to_hf(from_hf(copy.deepcopy(given)))
    assert {key: got[key] for key in given} == given
    assert from_hf(got) == from_hf(given)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "path, value",
    [
        ("attention.rope_theta", 5e5),
        ("attention.yarn", {"factor": 8.0, "original_positions": 512}),
        ("attention.yarn", None),
        ("attention.num_heads", 8),
        ("attention.rope_dim", 32),
        ("dtype", "float32"),
        ("remat", "none"),
        ("moe.router.score", "softmax"),
        ("moe.router.group_score", "max"),
        ("moe.router.group_score", "top2_sum"),
    ],
)
def test_a_field_changed_later_wins_over_the_file(name, path, value):
    cfg = changed(from_hf(FILES[name]), **{path: value})
    again = from_hf(to_hf(cfg))
    assert shape(again) == shape(cfg)
    assert json.loads(again.hf_extras)["eos_token_id"] == 1


@pytest.mark.parametrize(
    "change, meaning",
    [
        ({"n_shared_experts": None}, {"moe.num_shared_experts": 0}),
        (
            {"n_group": None, "topk_group": None, "topk_method": "greedy"},
            {
                "moe.router.num_groups": 1,
                "moe.router.groups_per_token": 1,
                "moe.router.group_score": "max",
            },
        ),
    ],
    ids=str,
)
def test_a_null_means_that_there_is_none_and_stays_null(change, meaning):
    got = from_hf(V3_FILE | change)
    assert shape(got) == changed(shape(from_hf(V3_FILE)), **meaning)
    assert {key: to_hf(got)[key] for key in change} == change


def test_float16_comes_in_as_float32_and_goes_out_as_what_it_is_then():
    got = from_hf(V3_FILE | {"torch_dtype": "float16", "dtype": "float16"})
    assert got.dtype == "float32"
    again = to_hf(got)
    assert again["torch_dtype"] == "float32" and "dtype" not in again


def test_head_sizes_that_transformers_saves_follow_the_fields():
    cfg = changed(from_hf(NEWER_FILE), **{"attention.rope_dim": 32})
    got = to_hf(cfg)
    assert (got["head_dim"], got["qk_head_dim"]) == (32, 128 + 32)


def test_what_hugging_face_has_no_key_for_is_written_only_when_unusual():
    tiny = ModelConfig.preset("tiny")
    assert "jmoe" not in to_hf(tiny)
    unusual = changed(tiny, **{"remat": "block", "attention.block_size": 64})
    assert to_hf(unusual)["jmoe"] == {
        "remat": "block",
        "attention.block_size": 64,
    }


@pytest.mark.parametrize(
    "group_score, num_groups, method",
    [
        ("top2_sum", 1, "noaux_tc"),
        ("top2_sum", 4, "noaux_tc"),
        ("max", 4, "group_limited_greedy"),
        ("max", 1, "greedy"),
    ],
)
def test_keys_that_only_vllm_reads_are_written(group_score, num_groups, method):
    router = {
        "moe.router.group_score": group_score,
        "moe.router.num_groups": num_groups,
        "moe.router.groups_per_token": 1,
    }
    got = to_hf(changed(ModelConfig.preset("tiny"), **router))
    assert got["topk_method"] == method
    assert got["scoring_func"] == "sigmoid"
    assert got["moe_layer_freq"] == 1
    assert got["model_type"] == "deepseek_v3"
    assert got["architectures"] == ["DeepseekV3ForCausalLM"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 must be 0"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures Llama DeepseekV3For"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 must be 1"),
        ({"attention_bias": True}, "attention_bias=True must be False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ({"rope_interleave": False}, "rope_interleave=False must be True"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 num_attention_heads=128"),
        ({"dtype": "float32"}, "torch_dtype='bfloat16' dtype='float32' disagree"),
        ({"torch_dtype": "float64"}, "dtype='float64' 'float32' 'bfloat16'"),
        ({"topk_method": "best"}, "topk_method 'best' noaux_tc group_limited_greedy"),
        ({"topk_method": "greedy"}, "topk_method='greedy' n_group=8 'noaux_tc'"),
        ({"scoring_func": "relu"}, "score='relu' 'sigmoid' 'softmax'"),
        ({"hidden_size": "7168"}, "hidden_size='7168' int"),
        ({"n_group": None}, "groups_per_token=4 num_groups=1"),
        ({"num_experts_per_tok": 200}, "top_k=200 128 groups_per_token=4"),
        ({"jmoe": ["remat"]}, "jmoe=['remat'] map"),
        ({"jmoe": {"remta": "block"}}, "'remta' Did you mean 'remat'"),
        ({"jmoe": {"remat": "all"}}, "remat='all' 'none' 'block'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_model_cannot_do_is_refused_by_name(change, said):
    with pytest.raises(ValueError) as error:
        from_hf(V3_FILE | change)
    missing = [word for word in said.split() if word not in str(error.value)]
    assert not missing, str(error.value)


def test_all_missing_keys_are_listed_at_once():
    given = without(V3_FILE, "hidden_size", "q_lora_rank")
    given["rope_scaling"] = {"type": "yarn"}
    with pytest.raises(ValueError) as error:
        from_hf(given)
    assert str(error.value) == (
        "The config lacks hidden_size, q_lora_rank, rope_scaling.factor, "
        "rope_scaling.original_max_position_embeddings."
    )
