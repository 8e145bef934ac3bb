"""Files of JSON lines that evaluations read: one object a line, with certain fields."""

import json
import pathlib
from collections.abc import Collection
from typing import Any


def read_records(
    path: pathlib.Path, fields: Collection[str], *, text: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Returns the objects of a .jsonl file; blank lines are none.

    Args:
      fields: what each must have.
      text: those of them that must hold text that isn't blank.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file has no lines, or one, named by its number, isn't UTF-8 or
        JSON, or misses a field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data={str(path)!r}: no such file.")
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    records.append(_parse(line, fields, text))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not records:
        raise ValueError(f"data={str(path)!r} is empty; it must have a JSON line each.")
    return records


def _parse(
    line: bytes, fields: Collection[str], text: Collection[str]
) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object.")
    missing = [name for name in fields if name not in record]
    if missing:
        listed, there = ", ".join(missing), ", ".join(record)
        raise ValueError(f"no field {listed}; the fields are {there or 'none'}.")
    for name in text:
        value = record[name]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name}={value!r} must be text.")
    return record
