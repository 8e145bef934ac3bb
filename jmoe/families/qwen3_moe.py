"""Qwen3's mixtures of experts (arXiv 2505.09388), in every layer, none of them shared.

Attention is that of dots.llm1. Scores are a softmax over all experts, and there are no
selection biases: Qwen balances by an auxiliary loss over the global batch.
"""

from collections.abc import Mapping
from typing import Any

from jmoe.config import GQAConfig, ModelConfig
from jmoe.families import attention, keys, names
from jmoe.families.family import Family, Names, require

FIELDS = {
    "num_dense_layers": 0,
    "mtp_depth": 0,
    "tie_embeddings": False,
    "attention.rope_pairs": "halves",
    "attention.qkv_bias": False,
    "moe.num_shared_experts": 0,
    "moe.router.num_groups": 1,
    "moe.router.score": "softmax",
    "moe.router.gate_scale": 1.0,
}
EXPERTS = {"moe.router.num_experts": "num_experts"}


def read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns attention's record."""
    epsilon = {"attention.qk_norm_eps": given["rms_norm_eps"]}
    return {**epsilon, **attention.read_grouped(given)}


def write(cfg: ModelConfig) -> dict[str, Any]:
    """Returns attention's keys that aren't renames."""
    assert isinstance(cfg.attention, GQAConfig)
    require(cfg, cfg.family, "attention.qk_norm_eps", cfg.norm_eps)
    require(cfg, cfg.family, "attention.rope_dim", cfg.attention.head_dim)
    return attention.write_grouped(cfg)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    attention=GQAConfig,
    keys=keys.without(
        keys.DECODER | attention.GROUPED_KEYS | keys.MOE | EXPERTS,
        *FIELDS,
        "moe.router.groups_per_token",
    ),
    defaults=keys.DEFAULTS,
    aliases={"num_experts": "num_local_experts"},
    constants={
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    accepted=keys.ACCEPTED,
    fields=FIELDS,
    read=read,
    write=write,
    names=Names(
        block=names.block(names.GROUPED_ATTENTION) | {"moe/router/bias": None},
        mtp={},
        model=names.MODEL,
    ),
)
