"""dots.llm1 (arXiv 2506.05767): attention with a norm of each head, routing as in V3.

Its own files call the score "noaux_tc" too, which is V3's name of how experts are
chosen. A file with sliding windows is refused: jmoe's attention has none.
"""

from collections.abc import Mapping
from typing import Any

from jmoe.config import GQAConfig, ModelConfig
from jmoe.families import attention, keys, names
from jmoe.families.family import Family, Names, require

FIELDS = {
    "mtp_depth": 0,
    "tie_embeddings": False,
    "attention.rope_pairs": "halves",
    "attention.qkv_bias": False,
    "moe.router.score": "sigmoid",
    "moe.router.group_score": "top2_sum",
}


def read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns attention's record; refuses layers that look at a part of the text."""
    windows = set(given.get("layer_types") or ()) - {"full_attention"}
    if windows:
        raise ValueError(
            f"layer_types has {', '.join(sorted(windows))}, which is not supported; "
            "each must be 'full_attention'."
        )
    epsilon = {"attention.qk_norm_eps": given["rms_norm_eps"]}
    return {**epsilon, **attention.read_grouped(given)}


def write(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the keys that follow from several fields, or from a record."""
    assert isinstance(cfg.attention, GQAConfig)
    require(cfg, cfg.family, "attention.qk_norm_eps", cfg.norm_eps)
    require(cfg, cfg.family, "attention.rope_dim", cfg.attention.head_dim)
    return {
        **attention.write_grouped(cfg),
        "layer_types": ["full_attention"] * cfg.num_layers,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


DOTS1 = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    attention=GQAConfig,
    keys=keys.without(keys.DECODER | attention.GROUPED_KEYS | keys.MOE, *FIELDS),
    defaults=keys.DEFAULTS,
    nulls=keys.NULLS,
    constants={
        "attention_bias": False,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    accepted=keys.ACCEPTED
    | {
        "moe_layer_freq": (1,),
        "scoring_func": ("sigmoid", "noaux_tc"),
        "topk_method": ("noaux_tc",),
        "use_sliding_window": (False, None),
    },
    fields=FIELDS,
    read=read,
    write=write,
    names=Names(block=names.block(names.GROUPED_ATTENTION), mtp={}, model=names.MODEL),
)
