"""Rotary embeddings in Hugging Face's `config.json`, in the spellings that are in use.

DeepSeek's own is `rope_theta`, and `rope_scaling` with a `type`; transformers 5 has all
in `rope_parameters`, with a `rope_type`. Where a key stands twice both must agree, and
a key that would mean nothing is refused: transformers takes one of two, or none, and
then computes plain rotary embeddings without a word.
"""

from collections.abc import Mapping
from typing import Any

from jmoe.config import checks
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
FIXED = {"attention_factor": None, "partial_rotary_factor": 1.0, "truncate": True}
KEYS_OF_TYPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "yarn": tuple(KEYS.values()),
}
SPELLINGS = ("rope_scaling", "rope_parameters")
# Stands in the object, but other models have it beside it.
_BESIDE = "original_max_position_embeddings"


def read(hf: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Returns `rope_theta`, and YaRN's keys: none of them for plain rotary embeddings.

    Raises:
      ValueError: two spellings disagree, a type that jmoe hasn't, or a key that the
        type doesn't have.
    """
    if hf.get("partial_rotary_factor") is not None:
        checks.refuse_unsupported(hf, FIXED)
    said = {key: _read(hf[key], key) for key in SPELLINGS if hf.get(key)}
    for name in said:
        inside = hf[name].get(_BESIDE)
        if inside is not None:
            checks.agreed({_BESIDE: hf.get(_BESIDE), f"{name}.{_BESIDE}": inside})
    thetas = {f"{key}.rope_theta": hf[key].get("rope_theta") for key in said}
    theta = checks.agreed(thetas | {"rope_theta": hf.get("rope_theta")})
    return theta, checks.agreed(said)


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
    allowed = (*known, "rope_theta", "rope_type", "type", *FIXED)
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
