"""Files of prompts: one a line, as text or as JSON, checked before any is completed."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jmoe.config import checks

FIELD = "prompt"


class Prompt(NamedTuple):
    """A text to go on from, and the record that it comes in, by its line from 1."""

    line: int
    text: str
    record: Mapping[str, Any]


def read_prompts(path: pathlib.Path) -> list[Prompt]:
    """Returns a file's prompts; lines that are blank have none.

    In a .jsonl file each line is an object whose field `prompt` is the text. In any
    other file the line itself is.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it holds no prompt, or a line isn't what it should be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts={str(path)!r} is not a file.")
    make = _from_json if path.suffix == ".jsonl" else _from_text
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode().removesuffix("\r")
            if text.strip():
                found.append(make(number, text))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
            reason = _REASONS.get(type(error), str(error))
            raise ValueError(
                f"prompts={str(path)!r}, line {number}: {reason}"
            ) from error
    if not found:
        raise ValueError(f"prompts={str(path)!r} holds no prompt: all lines are blank.")
    return found


_REASONS = {
    UnicodeDecodeError: "It must be UTF-8.",
    json.JSONDecodeError: "It must be a JSON object.",
}


def _from_text(number: int, line: str) -> Prompt:
    return Prompt(number, line, {FIELD: line})


def _from_json(number: int, line: str) -> Prompt:
    record = json.loads(line)
    if not checks.is_unicode(json.dumps(record, ensure_ascii=False)):
        raise ValueError("It has half of a surrogate pair, which is no character.")
    if not isinstance(record, dict):
        raise ValueError("It must be a JSON object.")
    if FIELD not in record:
        known = ", ".join(record) or "none"
        raise ValueError(f"It has no field {FIELD!r}; it has {known}.")
    text = record[FIELD]
    if not isinstance(text, str):
        raise ValueError(f"{FIELD}={text!r} must be a text.")
    return Prompt(number, text, record)
