"""Records to JSON and back, and `--set path.to.field=value` on nested records.

Types come from the records' own annotations, so an unknown field or a value of the
wrong type is refused by name. Where one of several records may stand, their field
`kind` tells them apart; values without one are of the first.
"""

import ast
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jmoe.config import checks

Record = TypeVar("Record")


def to_dict(record: Any) -> Any:
    """Returns nested plain dicts, lists and scalars, as `json.dumps` takes them."""
    return json.loads(json.dumps(dataclasses.asdict(record)))


def from_dict(
    cls: type[Record],
    values: Mapping[str, Any],
    path: str = "",
    others: Sequence[type] = (),
) -> Record:
    """Builds the record `cls`; ValueError names the field that doesn't fit.

    A class may have `updated`, which is given what an earlier version may have written
    and returns the fields of this one.

    Args:
      path: of the record in another one, with a dot at its end.
      others: records that could stand in its place.
    """
    if not isinstance(values, Mapping):
        what = path.removesuffix(".")
        raise ValueError(f"{what or 'It'} must be a record of {cls.__name__}.")
    values = getattr(cls, "updated", lambda values: values)(values)
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    known = [field.name for field in fields]
    for name in values:
        if name not in known:
            raise ValueError(_unknown_field(f"{path}{name}", name, known, others))
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        what = path.removesuffix(".") or cls.__name__
        raise ValueError(f"{what} lacks {', '.join(missing)}.")
    return cls(
        **{
            name: coerce(hints[name], value, f"{path}{name}")
            for name, value in values.items()
        }
    )


def override(record: Record, assignments: Iterable[str]) -> Record:
    """Applies `a.b.c=value` assignments, all at once, to nested records.

    Values are Python literals where they parse as one and strings otherwise; an item of
    a tuple goes by its index, as in `data.sources.0.weight=2`. All of them land before
    anything is validated, so `train.batch_size=6` and `train.microbatch_size=3` may be
    given in either order. `model.attention.kind=gqa` makes a record one of another
    kind, which keeps what both kinds have; the other fields of that kind come after it.

    Raises:
      ValueError: unknown field, malformed assignment, or a value of another type.
    """
    values = to_dict(record)
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r} must read path.to.field=value.")
        _assign(values, type(record), target.split("."), _literal(text))
    return from_dict(type(record), values)


def coerce(hint: Any, value: Any, path: str) -> Any:
    """Returns `value` as the annotated type `hint`.

    Ints pass for floats, and lists for tuples.
    """
    if _means_none(value, hint):
        return None
    if kinds := _records(hint):
        return _coerce_record(kinds, value, path)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(t for t in typing.get_args(hint) if t is not type(None))
        return coerce(inner, value, path)
    if origin is tuple:
        return _coerce_tuple(typing.get_args(hint), value, path)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    if not isinstance(value, hint) or (hint is int and not is_number):
        raise ValueError(f"{path}={value!r} must be of type {hint.__name__}.")
    if hint is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{path}={value} must fit into 64 bits.")
    if isinstance(value, str) and not checks.is_unicode(value):
        raise ValueError(f"{path}={value!r} must be UTF-8.")
    return value


def _means_none(value: Any, hint: Any) -> bool:
    return value in (None, "none") and type(None) in typing.get_args(hint)


def _coerce_record(kinds: Sequence[type], value: Any, path: str) -> Any:
    """Returns `value` as the one of these records that it is of."""
    parse = getattr(kinds[0], "parse", None)
    if parse is not None and isinstance(value, str):
        return parse(value)  # a record that has a short form
    if not isinstance(value, Mapping):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{path}={value!r} must be a record of {names}.")
    record = _of_kind(kinds, value, path)
    others = [kind for kind in kinds if kind is not record]
    return from_dict(record, value, f"{path}.", others)


def _of_kind(kinds: Sequence[type], values: Mapping[str, Any], path: str) -> type:
    """Returns the one of these records that has the `kind` of `values`."""
    if len(kinds) == 1 or "kind" not in values:
        return kinds[0]
    for record in kinds:
        if values["kind"] == _kind(record):
            return record
    known = ", ".join(repr(_kind(record)) for record in kinds)
    raise ValueError(f"{path}.kind={values['kind']!r} is not one of {known}.")


def _kind(record: type) -> str:
    """Returns what the records of a union have in their field `kind`."""
    (field,) = (f for f in dataclasses.fields(record) if f.name == "kind")  # type: ignore[arg-type]
    return str(field.default)


def _coerce_tuple(inner: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path}={value!r} must be a list.")
    if inner[-1] is Ellipsis:
        inner = inner[:1] * len(value)
    if len(inner) != len(value):
        raise ValueError(f"{path}={value!r} must hold {len(inner)} values.")
    return tuple(
        coerce(hint, item, f"{path}[{i}]")
        for i, (hint, item) in enumerate(zip(inner, value, strict=True))
    )


def _assign(values: Any, hint: Any, path: list[str], new: Any, done: str = "") -> Any:
    """Returns `values`, with `new` in place of what is at `path`.

    They stand for a `hint`.
    """
    if not path:
        return new
    name, *rest = path
    here = f"{done}.{name}" if done else name
    if isinstance(values, list) and typing.get_origin(hint) is tuple:
        known = [str(i) for i in range(len(values))]
        if name not in known:
            raise ValueError(_unknown_field(here, name, known))
        item, index = typing.get_args(hint)[0], int(name)
        values[index] = _assign(values[index], item, rest, new, here)
        return values
    kinds = _records(hint)
    if not kinds:
        raise ValueError(f"{done} is a plain value; it has no field {name!r}.")
    if not isinstance(values, dict):
        raise ValueError(f"{done}={values!r} must be a record to have a {name!r}.")
    record = _of_kind(kinds, values, done)
    hints = typing.get_type_hints(record)
    if name not in hints:
        raise ValueError(_unknown_field(here, name, list(hints), kinds))
    if name == "kind" and len(kinds) > 1 and not rest:
        shared = typing.get_type_hints(_of_kind(kinds, {name: new}, done))
        values = {field: value for field, value in values.items() if field in shared}
    values[name] = _assign(values.get(name), hints[name], rest, new, here)
    return values


def _records(hint: Any) -> list[Any]:
    """Returns the records that values of the type `hint` may be of."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    hints = typing.get_args(hint) if is_union else (hint,)
    return [h for h in hints if dataclasses.is_dataclass(h)]


def _literal(text: str) -> Any:
    if text in ("true", "false", "null"):  # JSON's words beside Python's
        return {"true": True, "false": False}.get(text)
    if text in ("inf", "nan"):
        return float(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _unknown_field(
    path: str, name: Any, known: list[str], kinds: Sequence[type] = ()
) -> str:
    """Says what is wrong with a field that isn't known, but one of `kinds` may have."""
    said = f"Unknown field {path!r}; known: {', '.join(known)}."
    of_kind = [_kind(kind) for kind in kinds if name in typing.get_type_hints(kind)]
    if of_kind:
        return f"{said} It is a field of kind={of_kind[0]!r}."
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"{said} Did you mean {close[0]!r}?" if close else said
