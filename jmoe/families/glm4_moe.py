"""GLM-4.5, GLM-4.5-Air and their successors (arXiv 2508.06471).

Grouped-query attention that rotates half of each head, in halves, with biases on
queries, keys and values; V3's routing by sigmoid scores and selection biases; MTP
layers as V3 has them.
"""

from collections.abc import Mapping
from typing import Any

from jmoe.config import GQAConfig, ModelConfig
from jmoe.families import attention, keys, names
from jmoe.families.family import Family, Names, require

FIELDS = {
    "attention.rope_pairs": "halves",
    "moe.router.score": "sigmoid",
    "moe.router.group_score": "top2_sum",
    "tie_embeddings": False,
}
BIAS = {"attention.qkv_bias": "attention_bias"}


def read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns attention's record, with the model's own epsilon for norms of heads."""
    epsilon = given["rms_norm_eps"] if given["use_qk_norm"] else None
    return {"attention.qk_norm_eps": epsilon, **attention.read_grouped(given)}


def write(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the keys that follow from several fields, or from a record."""
    assert isinstance(cfg.attention, GQAConfig)
    has_norms = cfg.attention.qk_norm_eps is not None
    if has_norms:
        require(cfg, cfg.family, "attention.qk_norm_eps", cfg.norm_eps)
    return {
        **attention.write_grouped(cfg),
        "partial_rotary_factor": cfg.attention.rope_dim / cfg.attention.head_dim,
        "use_qk_norm": has_norms,
    }


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    attention=GQAConfig,
    keys=keys.without(keys.DECODER | attention.GROUPED_KEYS | BIAS | keys.MOE, *FIELDS),
    defaults=keys.DEFAULTS
    | {"attention_bias": False, "partial_rotary_factor": 0.5, "use_qk_norm": False},
    nulls=keys.NULLS,
    constants={"hidden_act": "silu", "tie_word_embeddings": False},
    accepted=keys.DROPOUT
    | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    fields=FIELDS,
    read=read,
    write=write,
    names=Names(
        block=names.block(names.GROUPED_ATTENTION), mtp=names.MTP, model=names.MODEL
    ),
)
