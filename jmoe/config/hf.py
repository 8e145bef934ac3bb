"""Hugging Face's `config.json` of a `DeepseekV3ForCausalLM`, both ways and losslessly.

Most keys are renames; `KEYS` lists them all. The rest has a function each: rotary
scaling, the number type, and `topk_method`, which tells how groups of experts are
scored. They are written as in DeepSeek's own file (`rope_theta` and `rope_scaling`,
`torch_dtype`), which every version of transformers and vLLM reads; `rope_parameters`
and `dtype`, the spellings of transformers 5, come in as well.

Nothing is lost on the way. Fields that Hugging Face has no key for are written under
"jmoe", as `path: value`. Keys that aren't read, or would have been spelled otherwise,
are kept in `ModelConfig.hf_extras` and written back.

transformers reads neither `scoring_func` nor `topk_method`: it always computes sigmoid
scores and "noaux_tc". vLLM reads both.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from jmoe.config import checks, hf_rope, records
from jmoe.config.attention import MLAConfig, YarnConfig
from jmoe.config.model import ModelConfig, MoEConfig, RouterConfig

KEYS = {  # of each record: our field, Hugging Face's key
    ModelConfig: {
        "vocab_size": "vocab_size",
        "hidden_dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_dense_layers": "first_k_dense_replace",
        "dense_mlp_dim": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "mtp_depth": "num_nextn_predict_layers",
        "tie_embeddings": "tie_word_embeddings",
        "norm_eps": "rms_norm_eps",
        "init_std": "initializer_range",
        "dtype": "torch_dtype",
    },
    MLAConfig: {
        "num_heads": "num_attention_heads",
        "query_latent_dim": "q_lora_rank",
        "kv_latent_dim": "kv_lora_rank",
        "nope_dim": "qk_nope_head_dim",
        "rope_dim": "qk_rope_head_dim",
        "value_dim": "v_head_dim",
        "rope_theta": "rope_theta",
    },
    YarnConfig: hf_rope.KEYS,
    MoEConfig: {
        "expert_mlp_dim": "moe_intermediate_size",
        "num_shared_experts": "n_shared_experts",
    },
    RouterConfig: {
        "num_experts": "n_routed_experts",
        "top_k": "num_experts_per_tok",
        "num_groups": "n_group",
        "groups_per_token": "topk_group",
        "score": "scoring_func",
        "normalize_gates": "norm_topk_prob",
        "gate_scale": "routed_scaling_factor",
    },
}

DEFAULTS = {  # what a key means that is absent or null; all others are required
    "initializer_range": 0.02,
    "num_nextn_predict_layers": 0,
    "rope_theta": 10_000.0,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
}
NULLS = {  # what a key means that is null, yet required: there are none, and no groups
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
}
WIDENED = {"float16": "float32"}  # types that jmoe computes in a wider one
FIXED = {  # what the model has no choice about
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
ARCHITECTURE = "DeepseekV3ForCausalLM"

TOPK_METHODS = {  # topk_method: our group_score
    "noaux_tc": "top2_sum",
    "group_limited_greedy": "max",
    "greedy": "max",  # has no groups
}


def model_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Returns the shape that a `config.json` describes; inverse of `model_to_hf`.

    Args:
      hf: the parsed file, with rotary scaling and number type in either spelling.

    Raises:
      ValueError: another architecture, an option that jmoe's model doesn't have,
        missing keys (all are listed), spellings that disagree, an impossible shape.
    """
    cfg = _read(hf)
    written = _write(cfg)
    extras = {
        key: value
        for key, value in hf.items()
        if (key not in written or written[key] != value) and not _is_widened(key, value)
    }
    return dataclasses.replace(cfg, hf_extras=json.dumps(extras, sort_keys=True))


def model_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """Returns `cfg`'s `config.json`, with every key that transformers and vLLM need.

    Keys kept from an earlier file are written as they were there. Those that describe
    a field give way once that field has been changed.
    """
    written = _write(cfg)
    extras = json.loads(cfg.hf_extras)
    as_it_was = written | extras
    if _reads_as(as_it_was, cfg):
        return as_it_was
    outdated = ("dtype", "jmoe", "rope_parameters")
    return {k: v for k, v in extras.items() if k not in outdated} | written


def _is_widened(key: str, value: Any) -> bool:
    """Returns whether numbers come in as another type, so that theirs is not kept."""
    return key in ("dtype", "torch_dtype") and value in tuple(WIDENED)


def _reads_as(hf: Mapping[str, Any], cfg: ModelConfig) -> bool:
    try:
        return _read(hf) == dataclasses.replace(cfg, hf_extras="{}")
    except ValueError:  # two spellings disagree
        return False


def _read(hf: Mapping[str, Any]) -> ModelConfig:
    """Returns everything but `hf_extras`."""
    checks.refuse_unsupported(hf, FIXED)
    if ARCHITECTURE not in (hf.get("architectures") or [ARCHITECTURE]):
        raise ValueError(
            f"architectures={hf['architectures']!r} must hold {ARCHITECTURE!r}."
        )
    given = _one_spelling(hf)
    rope = given["rope_scaling"]
    _refuse_missing(given, rope)
    heads = given["num_attention_heads"]
    if given.get("num_key_value_heads") not in (None, heads):
        raise ValueError(
            f"num_key_value_heads={given['num_key_value_heads']!r} must equal "
            f"num_attention_heads={heads!r}: heads share a latent, not keys."
        )
    yarn = YarnConfig(**_fields(YarnConfig, rope, "rope_scaling.")) if rope else None
    group_score = _group_score(given)
    router = RouterConfig(**_fields(RouterConfig, given), group_score=group_score)
    cfg = ModelConfig(
        **_fields(ModelConfig, given),
        attention=MLAConfig(**_fields(MLAConfig, given), yarn=yarn),
        moe=MoEConfig(**_fields(MoEConfig, given), router=router),
    )
    own = given.get("jmoe", {})
    if not isinstance(own, Mapping):
        raise ValueError(f"jmoe={own!r} must map paths of fields to their values.")
    return records.override(cfg, [f"{path}={value!r}" for path, value in own.items()])


def _write(cfg: ModelConfig) -> dict[str, Any]:
    """Returns everything but what `hf_extras` holds."""
    attention, router = cfg.attention, cfg.moe.router
    if not isinstance(attention, MLAConfig):
        raise ValueError(
            f"attention.kind={attention.kind!r} must be 'mla' in a {ARCHITECTURE}."
        )
    hf: dict[str, Any] = {
        **FIXED,
        "architectures": [ARCHITECTURE],
        # transformers derives these three, yet believes a stale one in the file.
        "num_key_value_heads": attention.num_heads,
        "head_dim": attention.rope_dim,
        "qk_head_dim": attention.qk_dim,
        "rope_scaling": hf_rope.write(attention.yarn),
        "topk_method": _topk_method(router),
    }
    for record in (cfg, attention, cfg.moe, router):
        hf |= {key: getattr(record, name) for name, key in KEYS[type(record)].items()}
    said = _flatten(records.to_dict(_read(hf)))
    own = {
        path: value
        for path, value in _flatten(records.to_dict(cfg)).items()
        if path != "hf_extras" and value != said[path]
    }
    return hf | {"jmoe": own} if own else hf


def _fields(cls: type, given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the record's fields that are plain renames, each of its own type."""
    hints = typing.get_type_hints(cls)
    return {
        name: records.coerce(hints[name], given[key], f"{prefix}{key}")
        for name, key in KEYS[cls].items()
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one, by dotted path."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _one_spelling(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `hf` in DeepSeek's own spelling, with absent and null keys filled in."""
    theta, rope = hf_rope.read(hf)
    dtype = checks.agreed({key: hf.get(key) for key in ("torch_dtype", "dtype")})
    given = {
        **hf,
        "rope_theta": theta,
        "rope_scaling": rope,
        "torch_dtype": WIDENED.get(dtype, dtype),
    }
    said = {k: v for k, v in given.items() if v is not None or k not in DEFAULTS}
    nulls = {k: v for k, v in NULLS.items() if k in given and given[k] is None}
    return DEFAULTS | said | nulls


def _group_score(given: Mapping[str, Any]) -> str:
    method, groups = given["topk_method"], given["n_group"]
    if method == "greedy" and groups != 1:
        raise ValueError(
            f"topk_method='greedy' has no groups, but n_group={groups!r}; groups need "
            "'noaux_tc' or 'group_limited_greedy'."
        )
    return checks.lookup(TOPK_METHODS, method, "topk_method")


def _topk_method(router: RouterConfig) -> str:
    if router.group_score == "top2_sum":
        return "noaux_tc"
    return "greedy" if router.num_groups == 1 else "group_limited_greedy"


def _refuse_missing(given: Mapping[str, Any], rope: Mapping[str, Any] | None) -> None:
    top = [key for cls in KEYS if cls is not YarnConfig for key in KEYS[cls].values()]
    missing = [key for key in ("model_type", *top) if key not in given]
    if rope:
        inner = KEYS[YarnConfig].values()
        missing += [f"rope_scaling.{key}" for key in inner if key not in rope]
    if missing:
        raise ValueError(f"The config lacks {', '.join(missing)}.")
