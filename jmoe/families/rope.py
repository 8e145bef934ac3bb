"""Rotary embeddings in Hugging Face's `config.json`, in the spellings that are in use.

DeepSeek's own is `rope_theta`, and `rope_scaling` with a `type`; transformers 5 has all
in `rope_parameters`, with a `rope_type`, and there the part of a head that is rotated
too. Where a key stands twice both must agree, and a key that would mean nothing is
refused: transformers takes one of two, or none, and then computes plain rotary
embeddings without a word.
"""

import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jmoe.config import checks, records
from jmoe.config.attention import YarnConfig

KEYS = {  # our field: Hugging Face's key, inside rope_scaling
    "factor": "factor",
    "original_positions": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
DEFAULTS = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": None,
    "mscale_all_dim": None,
}
FIXED = {"attention_factor": None, "truncate": True}
KEYS_OF_TYPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "yarn": tuple(KEYS.values()),
}
SPELLINGS = ("rope_scaling", "rope_parameters")


class Rope(NamedTuple):
    """`rope_theta`; YaRN's keys, none for plain rotary embeddings; the rotated part.

    Any of them is None where no spelling has it.
    """

    theta: Any
    scaling: dict[str, Any] | None
    partial_rotary_factor: Any


def read(hf: Mapping[str, Any]) -> Rope:
    """Returns what all spellings say.

    Raises:
      ValueError: two spellings disagree, a type that jmoe hasn't, or a key that the
        type doesn't have.
    """
    said = {key: _read(hf[key], key) for key in SPELLINGS if hf.get(key)}
    positions = "original_max_position_embeddings"
    if any(hf[name].get(positions) is not None for name in said):
        _agreed(hf, said, positions)  # other models have it beside the object
    return Rope(
        theta=_agreed(hf, said, "rope_theta"),
        scaling=checks.agreed(said),
        partial_rotary_factor=_agreed(hf, said, "partial_rotary_factor"),
    )


def _agreed(hf: Mapping[str, Any], spellings: Iterable[str], key: str) -> Any:
    """Returns what a key is, which may stand beside the objects and in each of them."""
    inside = {f"{name}.{key}": hf[name].get(key) for name in spellings}
    return checks.agreed(inside | {key: hf.get(key)})


def missing(scaling: Mapping[str, Any] | None) -> list[str]:
    """Returns the keys of YaRN that a scaling which `read` returned lacks."""
    if not scaling:
        return []
    return [f"rope_scaling.{key}" for key in KEYS.values() if key not in scaling]


def yarn(scaling: Mapping[str, Any] | None) -> YarnConfig | None:
    """Returns the record of a scaling that `read` returned."""
    if not scaling:
        return None
    hints = typing.get_type_hints(YarnConfig)
    return YarnConfig(
        **{
            name: records.coerce(hints[name], scaling[key], f"rope_scaling.{key}")
            for name, key in KEYS.items()
        }
    )


def write(yarn: YarnConfig | None) -> dict[str, Any] | None:
    """Returns `rope_scaling`."""
    if yarn is None:
        return None
    keys = {key: getattr(yarn, name) for name, key in KEYS.items()}
    return {"type": "yarn"} | {k: v for k, v in keys.items() if v is not None}


def _read(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}={given!r} must be an object.")
    spellings = {f"{name}.{key}": given.get(key) for key in ("rope_type", "type")}
    rope_type = checks.agreed(spellings) or "default"
    if rope_type not in tuple(KEYS_OF_TYPE):
        listed = ", ".join(map(repr, KEYS_OF_TYPE))
        raise ValueError(f"{name}.rope_type={rope_type!r} is not one of {listed}.")
    known = KEYS_OF_TYPE[rope_type]
    allowed = (*known, "rope_theta", "partial_rotary_factor", "rope_type", "type")
    allowed += tuple(FIXED)
    unknown = [
        f"{name}.{key}={value!r}"
        for key, value in given.items()
        if key not in allowed and value is not None
    ]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} would be ignored by rotary embeddings of rope_type="
            f"{rope_type!r}, which have {', '.join(allowed)}."
        )
    checks.refuse_unsupported(given, FIXED, f"{name}.")
    if not known:
        return {}
    return DEFAULTS | {k: given[k] for k in known if given.get(k) is not None}
