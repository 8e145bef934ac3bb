"""DeepSeek-V3 and all that share its architecture: R1, V3.1, Moonlight, Kimi K2.

They are described in arXiv 2412.19437, 2501.12948, 2502.16982 and 2507.20534. All are
`DeepseekV3ForCausalLM`. Kimi K2 gives itself a `model_type` of its own, which vLLM
knows and transformers doesn't: there, its files come with code, or are loaded with a
config whose `model_type` has been set to "deepseek_v3". Without, version 5 leaves the
experts out and only warns of it.

transformers reads neither `scoring_func` nor `topk_method`: it always computes sigmoid
scores and "noaux_tc". vLLM reads both.

What is stored in FP8 where anything is: the matrices of attention and of all MLPs.
Embedding, head, norms, routers and `eh_proj` stay bfloat16, selection biases float32.
That, too, is DeepSeek's choice: with it, V3 has the 91,991 tensors that were published.
Embedding and head are repeated in each MTP module, as in DeepSeek's own checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jmoe.config import ModelConfig, checks
from jmoe.families import attention, keys, names
from jmoe.families.family import Family, Names

TOPK_METHODS = {  # topk_method: our group_score
    "noaux_tc": "top2_sum",
    "group_limited_greedy": "max",
    "greedy": "max",  # has no groups
}


def read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns YaRN's record, and how groups are scored."""
    group_score = read_topk_method(given, TOPK_METHODS)
    return {"moe.router.group_score": group_score, **attention.read_latent(given)}


def read_topk_method(given: Mapping[str, Any], known: Mapping[str, str]) -> str:
    """Returns `known[topk_method]`, the way groups are scored.

    Raises:
      ValueError: it isn't known, or has no groups and there are some.
    """
    method, groups = given["topk_method"], given["n_group"]
    if method == "greedy" and groups != 1:
        others = " or ".join(repr(name) for name in known if name != "greedy")
        raise ValueError(
            f"topk_method='greedy' has no groups, but n_group={groups!r}; groups need "
            f"{others}."
        )
    return checks.lookup(known, method, "topk_method")


def write(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the keys that follow from several fields, or from a record."""
    router = cfg.moe.router
    method = "greedy" if router.num_groups == 1 else "group_limited_greedy"
    if router.group_score == "top2_sum":
        method = "noaux_tc"
    return {**attention.write_latent(cfg), "topk_method": method}


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=keys.DECODER | attention.LATENT_KEYS | keys.MOE,
    defaults=keys.DEFAULTS | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    nulls=keys.NULLS,
    constants={
        "attention_bias": False,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "rope_interleave": True,
    },
    accepted=keys.ACCEPTED,
    read=read,
    write=write,
    names=Names(
        block=names.block(names.LATENT_ATTENTION), mtp=names.MTP, model=names.MODEL
    ),
)
KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, model_type="kimi_k2")
