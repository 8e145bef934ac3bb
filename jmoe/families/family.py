"""What a family of models is: how its config.json and its tensors are named.

A family decides nothing about what a model computes. It says how one reads in Hugging
Face's files: which key is which field, what the files can't say, and which tensor is
which piece of our variables.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jmoe.config import GQAConfig, MLAConfig, ModelConfig
from jmoe.config.model import ROUTERS

# What every family's files leave open, and how far; all else readers would not follow.
COMMON = {
    "moe.router.kind": tuple(
        name for name, kind in ROUTERS.items() if kind.as_token_choice
    ),
    "moe.router.score": ("sigmoid", "softmax"),
    "moe.router.hash_layers": (0,),
}

Table = dict[str, str | tuple[str, str] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Our paths and the names of a family's tensors.

    block: in a block, {our path: its tensor's name, those of the two halves of a fused
    pair, or None where their files have no such tensor: it is zero}. A name with
    `{expert}` stands for one tensor an expert. mtp: in an MTP module, beside its block.
    model: outside of the blocks, and under which name in each MTP module, or None.
    """

    block: Table
    mtp: Mapping[str, str]
    model: Mapping[str, tuple[str, str | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of one family read in Hugging Face's files.

    Fields go by their dotted path in a `ModelConfig`.

    Attributes:
      model_type: the family's name, here and in config.json.
      architecture: the class of transformers that loads its checkpoints.
      attention: the record of its attention.
      keys: {field: the key that says it}, for plain renames.
      defaults: what a key means that is absent or null; all other keys are required.
      nulls: what a key means that is null, yet required.
      aliases: {key: another name of it}; what is written has the key.
      constants: what is written in every file, and may have no other value.
      accepted: {key: the values that it may have}, for keys that aren't written. They
        stand for options that jmoe's models don't have.
      fields: the fields that no key says, and the only value that each may have.
      read: what else a config.json says, as {field: value}. It is given the file with
        one spelling of everything, and absent keys filled in.
      write: the keys that aren't plain renames.
      names: of the tensors.
    """

    model_type: str
    architecture: str
    attention: type[MLAConfig] | type[GQAConfig] = MLAConfig
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    nulls: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any]
    accepted: Mapping[str, Sequence[Any]]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[ModelConfig], Mapping[str, Any]]
    names: Names

    def check(self, cfg: ModelConfig) -> None:
        """Raises ValueError if files of this family can't describe the model `cfg`."""
        require(cfg, self.model_type, "attention.kind", self.attention.kind)
        for field, value in self.fields.items():
            require(cfg, self.model_type, field, value)
        for field, values in COMMON.items():
            require(cfg, self.model_type, field, *values)


def require(cfg: ModelConfig, family: str, field: str, *values: Any) -> None:
    """Raises ValueError unless the field, at a dotted path, has one of the values."""
    given = value_of(cfg, field)
    if given not in values:
        raise ValueError(
            f"family={family!r} has {field}={values[0]!r}, and its files can't say "
            f"{given!r}."
        )


def value_of(cfg: ModelConfig, field: str) -> Any:
    """Returns the field at a dotted path."""
    value: Any = cfg
    for name in field.split("."):
        value = getattr(value, name)
    return value
