"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): softmax scores, no selection bias.

A group is scored by its best expert, and gates are the scores times
`routed_scaling_factor`, not normalised. With `norm_topk_prob`, implementations differ:
DeepSeek's own divides by the gates' sum and then doesn't scale, vLLM does both, and
transformers never divides. It is therefore refused; no published V2 has it.
"""

from collections.abc import Mapping
from typing import Any

from jmoe.families import attention, deepseek_v3, keys, names
from jmoe.families.family import Family, Names

FIELDS = {
    "mtp_depth": 0,
    "moe.router.score": "softmax",
    "moe.router.group_score": "max",
    "moe.router.normalize_gates": False,
}


TOPK_METHODS = {"group_limited_greedy": "max", "greedy": "max"}


def read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns YaRN's record; all else is `FIELDS`."""
    deepseek_v3.read_topk_method(given, TOPK_METHODS)
    return attention.read_latent(given)


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys=keys.without(keys.DECODER | attention.LATENT_KEYS | keys.MOE, *FIELDS),
    defaults=keys.DEFAULTS | {"topk_method": "greedy"},
    nulls=keys.NULLS,
    constants={
        "attention_bias": False,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
    },
    accepted=keys.ACCEPTED | {"mlp_bias": (False, None)},
    fields=FIELDS,
    read=read,
    write=deepseek_v3.write,
    names=Names(
        block=names.block(names.LATENT_ATTENTION) | {"moe/router/bias": None},
        mtp={},
        model=names.MODEL,
    ),
)
