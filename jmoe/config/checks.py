"""The few checks that every record shares, each with one wording."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

MAX_SEED = 2**32 - 1  # JAX drops the bits of a key's seed beyond 32
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def at_least(record: Any, **minimum: float) -> None:
    """Raises ValueError for the first field below its minimum, or infinite."""
    for field, low in minimum.items():
        value = getattr(record, field)
        if not value >= low:
            raise ValueError(f"{field}={value!r} must be at least {low}.")
    finite(record, *minimum)


def at_most(record: Any, **maximum: float) -> None:
    """Raises ValueError for the first field above its maximum, or infinite."""
    for field, high in maximum.items():
        value = getattr(record, field)
        if not value <= high:
            raise ValueError(f"{field}={value!r} must be at most {high}.")
    finite(record, *maximum)


def finite(record: Any, *fields: str) -> None:
    """Raises ValueError for the first field that is infinite or no number.

    None passes, which stands for no value.
    """
    for field in fields:
        value = getattr(record, field)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{field}={value!r} must be finite.")


def above_zero(record: Any, *fields: str) -> None:
    """Raises ValueError for the first field that isn't, or is infinite; None passes."""
    finite(record, *fields)
    for field in fields:
        value = getattr(record, field)
        if value is not None and not value > 0:
            raise ValueError(f"{field}={value} must be above 0.")


def one_of(record: Any, **allowed: Sequence[Any]) -> None:
    """Raises ValueError for the first field that isn't among its allowed values."""
    for field, values in allowed.items():
        value = getattr(record, field)
        if value not in values:
            listed = ", ".join(map(repr, values))
            raise ValueError(f"{field}={value!r} is not one of {listed}.")


def local_path(field: str, text: str) -> pathlib.Path:
    """Returns the path that `text` means, `~` expanded.

    Raises:
      ValueError: `text` is empty, a URL, or has what no name of a file can have; or
        `~` means no directory.
    """
    if not text or "\0" in text or not is_unicode(text) or _URL.match(text):
        raise ValueError(
            f"{field}={text!r} must be a path of this machine, in UTF-8; URLs such as "
            "gs:// are not supported."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{field}={text!r}: nobody has that home here.") from error


def is_unicode(text: str) -> bool:
    """Returns whether `text` can be written as UTF-8.

    A command line with other bytes becomes text that can't.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`, or a ValueError that lists what there is."""
    if name not in table:
        raise ValueError(f"Unknown {what} {name!r}; known: {', '.join(table)}.")
    return table[name]


def agreed(spellings: Mapping[str, Any]) -> Any:
    """Returns the one value of the keys that have any; None if none has.

    Raises ValueError if two of them differ.
    """
    said = {key: value for key, value in spellings.items() if value is not None}
    values = list(said.values())
    if any(value != values[0] for value in values):
        listed = " and ".join(f"{key}={value!r}" for key, value in said.items())
        raise ValueError(f"{listed} disagree.")
    return values[0] if values else None


def refuse_unsupported(
    given: Mapping[str, Any], fixed: Mapping[str, Any], prefix: str = ""
) -> None:
    """Raises ValueError for the first key that isn't absent or as `fixed` has it."""
    for key, allowed in fixed.items():
        value = given.get(key, allowed)
        if value != allowed:
            raise ValueError(
                f"{prefix}{key}={value!r} is not supported; it must be {allowed!r}."
            )
