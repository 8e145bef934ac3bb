"""The families that jmoe reads and writes; each is a line here and a file beside."""

from collections.abc import Mapping
from typing import Any

from jmoe.config import ModelConfig
from jmoe.families import config_json
from jmoe.families.deepseek_v2 import DEEPSEEK_V2
from jmoe.families.deepseek_v3 import DEEPSEEK_V3, KIMI_K2
from jmoe.families.dots1 import DOTS1
from jmoe.families.family import Family
from jmoe.families.glm4_moe import GLM4_MOE
from jmoe.families.qwen3_moe import QWEN3_MOE

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        DEEPSEEK_V3,
        KIMI_K2,
        DEEPSEEK_V2,
        GLM4_MOE,
        DOTS1,
        QWEN3_MOE,
    )
}


def lookup(name: str, what: str = "family") -> Family:
    """Returns the family called `name`; ValueError names the known ones."""
    if name not in tuple(FAMILIES):
        raise ValueError(
            f"{what}={name!r} is not a family of models that jmoe knows: "
            f'{", ".join(FAMILIES)}. docs/how_to_add.md, "Add a model family", says '
            "what a new one takes."
        )
    return FAMILIES[name]


def family_of(cfg: ModelConfig) -> Family:
    """Returns the family of `cfg`.

    Raises:
      ValueError: it isn't known, or its files can't describe this model; names those
        whose files can.
    """
    family = lookup(cfg.family)
    try:
        family.check(cfg)
    except ValueError as error:
        others = ", ".join(filter(lambda name: _describes(name, cfg), FAMILIES))
        raise ValueError(
            f"{error} Of the known families, these can describe the model: "
            f"{others or 'none'}."
        ) from None
    return family


def _describes(name: str, cfg: ModelConfig) -> bool:
    try:
        FAMILIES[name].check(cfg)
    except ValueError:
        return False
    return True


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Returns the model that Hugging Face's `config.json` describes, given as a dict.

    Raises:
      ValueError: a family that isn't known; what `config_json.read` raises.
    """
    if "model_type" not in hf:
        raise ValueError(
            "The config lacks model_type, the family of the model; known: "
            f"{', '.join(FAMILIES)}."
        )
    return config_json.read(hf, lookup(hf["model_type"], "model_type"))


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the `config.json` that transformers and vLLM read; inverse of `from_hf`.

    Raises:
      ValueError: `cfg.family` isn't known, or its files can't describe this model.
    """
    return config_json.write(cfg, family_of(cfg))
