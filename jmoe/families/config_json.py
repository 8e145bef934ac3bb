"""Hugging Face's `config.json` of any family, both ways and losslessly.

Most keys are renames, which a family lists; the rest it reads and writes by functions
of its own. Rotary scaling and the number type are written as in DeepSeek's own file
(`rope_theta` and `rope_scaling`, `torch_dtype`), which every version of transformers
and vLLM reads; `rope_parameters` and `dtype`, the spellings of transformers 5, come in
as well.

Nothing is lost on the way. Fields that Hugging Face has no key for are written under
"jmoe", as `path: value`. Keys that aren't read, or would have been spelled otherwise,
are kept in `ModelConfig.hf_extras` and written back.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jmoe.config import checks, records
from jmoe.config.model import ModelConfig, MoEConfig, RouterConfig
from jmoe.families import rope
from jmoe.families.family import Family, value_of

WIDENED = {"float16": "float32"}  # types that jmoe computes in a wider one
ALIASES = {"torch_dtype": "dtype"}  # every family's
OWN = "jmoe"
_SAID_APART = ("family", "hf_extras")  # fields that are no values of the model


def read(hf: Mapping[str, Any], family: Family) -> ModelConfig:
    """Returns the shape that a `config.json` describes; `write` is the inverse.

    Args:
      hf: the parsed file, with rotary scaling and number type in either spelling.

    Raises:
      ValueError: another architecture, an option that jmoe's model doesn't have,
        missing keys (all are listed), spellings that disagree, an impossible shape.
    """
    cfg = _read(hf, family)
    written = _write(cfg, family)
    extras = {
        key: value
        for key, value in hf.items()
        if (key not in written or written[key] != value) and not _is_widened(key, value)
    }
    return dataclasses.replace(cfg, hf_extras=json.dumps(extras, sort_keys=True))


def write(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns the `config.json` of `cfg`, with every key that readers of it need.

    Keys kept from an earlier file are written as they were there. Those that describe
    a field give way once that field has been changed.

    Raises:
      ValueError: `cfg` is a model that files of this family can't describe.
    """
    written = _write(cfg, family)
    extras = json.loads(cfg.hf_extras)
    as_it_was = written | extras
    if _reads_as(as_it_was, cfg, family):
        return as_it_was
    outdated = (*_aliases(family).values(), OWN, "rope_parameters")
    return {k: v for k, v in extras.items() if k not in outdated} | written


def _is_widened(key: str, value: Any) -> bool:
    """Returns whether numbers come in as another type, so that theirs is not kept."""
    return key in ("dtype", "torch_dtype") and value in tuple(WIDENED)


def _reads_as(hf: Mapping[str, Any], cfg: ModelConfig, family: Family) -> bool:
    try:
        return _read(hf, family) == dataclasses.replace(cfg, hf_extras="{}")
    except ValueError:  # two spellings disagree
        return False


def _read(hf: Mapping[str, Any], family: Family) -> ModelConfig:
    """Everything but `hf_extras`."""
    checks.refuse_unsupported(hf, family.constants)
    architecture = family.architecture
    if architecture not in (hf.get("architectures") or [architecture]):
        raise ValueError(
            f"architectures={hf['architectures']!r} must hold {architecture!r}."
        )
    given = _one_spelling(hf, family)
    _refuse_options(given, family.accepted)
    missing = [key for key in family.keys.values() if key not in given]
    missing += rope.missing(given["rope_scaling"])
    if missing:
        raise ValueError(f"The config lacks {', '.join(missing)}.")
    values = dict(family.fields)
    for field, key in family.keys.items():
        values[field] = records.coerce(_hint(field, family), given[key], key)
    cfg = _build({**values, **family.read(given)}, family)
    own = given.get(OWN, {})
    if not isinstance(own, Mapping):
        raise ValueError(f"{OWN}={own!r} must map paths of fields to their values.")
    cfg = records.override(cfg, [f"{path}={value!r}" for path, value in own.items()])
    family.check(cfg)
    return cfg


def _write(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    """Everything but what `hf_extras` holds."""
    hf: dict[str, Any] = {
        "model_type": family.model_type,
        **family.constants,
        "architectures": [family.architecture],
        **family.write(cfg),
    }
    hf |= {key: value_of(cfg, field) for field, key in family.keys.items()}
    said = _flatten(records.to_dict(_read(hf, family)))
    own = {
        path: value
        for path, value in _flatten(records.to_dict(cfg)).items()
        if path not in _SAID_APART and value != said[path]
    }
    return hf | {OWN: own} if own else hf


def _refuse_options(
    hf: Mapping[str, Any], accepted: Mapping[str, Sequence[Any]]
) -> None:
    for key, values in accepted.items():
        if key in hf and hf[key] not in values:
            listed = " or ".join(map(repr, values))
            raise ValueError(
                f"{key}={hf[key]!r} is not supported; it must be {listed}."
            )


def _one_spelling(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """`hf` in DeepSeek's own spelling, with absent and null keys filled in."""
    rotary = rope.read(hf)
    given = {**hf, "rope_theta": rotary.theta, "rope_scaling": rotary.scaling}
    if rotary.partial_rotary_factor is not None:
        given["partial_rotary_factor"] = rotary.partial_rotary_factor
    for key, alias in _aliases(family).items():
        if key in hf or alias in hf:
            given[key] = checks.agreed({name: hf.get(name) for name in (key, alias)})
    dtype = given.get("torch_dtype")
    given["torch_dtype"] = WIDENED.get(dtype or "", dtype)
    defaults = family.defaults
    said = {k: v for k, v in given.items() if v is not None or k not in defaults}
    nulls = {k: v for k, v in family.nulls.items() if k in given and given[k] is None}
    return {**defaults, **said, **nulls}


def _aliases(family: Family) -> dict[str, str]:
    return {**ALIASES, **family.aliases}


def _records(family: Family) -> dict[str, type]:
    """Returns the records of a model, by where they are in it."""
    return {
        "": ModelConfig,
        "attention": family.attention,
        "moe": MoEConfig,
        "moe.router": RouterConfig,
    }


def _hint(field: str, family: Family) -> Any:
    where, _, name = field.rpartition(".")
    return typing.get_type_hints(_records(family)[where])[name]


def _build(values: Mapping[str, Any], family: Family) -> ModelConfig:
    def record(where: str, **inner: Any) -> Any:
        own = {
            name: value
            for (prefix, _, name), value in (
                (field.rpartition("."), value) for field, value in values.items()
            )
            if prefix == where
        }
        return _records(family)[where](**own, **inner)

    return record(
        "",
        family=family.model_type,
        attention=record("attention"),
        moe=record("moe", router=record("moe.router")),
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted path."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
