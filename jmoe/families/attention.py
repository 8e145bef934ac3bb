"""The records of attention in config.json, one kind after the other.

Of each kind: the keys that are renames, what else is read, and what else is written.
"""

from collections.abc import Mapping
from typing import Any

from jmoe.config import GQAConfig, ModelConfig, records
from jmoe.families import rope
from jmoe.families.family import require

LATENT_KEYS = {
    "attention.num_heads": "num_attention_heads",
    "attention.query_latent_dim": "q_lora_rank",
    "attention.kv_latent_dim": "kv_lora_rank",
    "attention.nope_dim": "qk_nope_head_dim",
    "attention.rope_dim": "qk_rope_head_dim",
    "attention.value_dim": "v_head_dim",
    "attention.rope_theta": "rope_theta",
}
GROUPED_KEYS = {
    "attention.num_heads": "num_attention_heads",
    "attention.num_kv_heads": "num_key_value_heads",
    "attention.rope_theta": "rope_theta",
}


def read_latent(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns YaRN's record; refuses keys and values that heads would share."""
    heads = given["num_attention_heads"]
    if given.get("num_key_value_heads") not in (None, heads):
        raise ValueError(
            f"num_key_value_heads={given['num_key_value_heads']!r} must equal "
            f"num_attention_heads={heads!r}: heads share a latent, not keys."
        )
    return {"attention.yarn": rope.yarn(given["rope_scaling"])}


def write_latent(cfg: ModelConfig) -> dict[str, Any]:
    """Returns what transformers derives, yet believes if it is stale in the file."""
    return {
        "num_key_value_heads": cfg.attention.num_heads,
        "head_dim": cfg.attention.rope_dim,
        "qk_head_dim": cfg.attention.qk_dim,
        "rope_scaling": rope.write(cfg.attention.yarn),
    }


def read_grouped(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the size of a head and of its rotated part, and YaRN's record.

    YaRN's temperature is on cosines and sines, as transformers has it for models
    without latents; `mscale` and `mscale_all_dim` would move it, and are refused.
    """
    head_dim = given.get("head_dim")
    if head_dim is None:
        head_dim = given["hidden_size"] // given["num_attention_heads"]
    head_dim = records.coerce(int, head_dim, "head_dim")
    rotated = given.get("partial_rotary_factor", 1.0)
    rotated = records.coerce(float, rotated, "partial_rotary_factor")
    scaling = given["rope_scaling"] or {}
    for key in ("mscale", "mscale_all_dim"):
        if scaling.get(key) is not None:
            raise ValueError(
                f"rope_scaling.{key}={scaling[key]!r} is not supported in this family; "
                "it must be null."
            )
    return {
        "attention.head_dim": head_dim,
        "attention.rope_dim": int(head_dim * rotated),
        "attention.yarn": rope.yarn(scaling),
    }


def write_grouped(cfg: ModelConfig) -> dict[str, Any]:
    """Returns what `read_grouped` reads, but for the part that is rotated."""
    assert isinstance(cfg.attention, GQAConfig)
    if cfg.attention.yarn is not None:
        for field in ("mscale", "mscale_all_dim"):
            require(cfg, cfg.family, f"attention.yarn.{field}", None)
    return {
        "head_dim": cfg.attention.head_dim,
        "rope_scaling": rope.write(cfg.attention.yarn),
    }
