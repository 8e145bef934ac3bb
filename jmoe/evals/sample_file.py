"""The samples of an evaluation in a file, for people to read and for a rerun to go on.

A file of JSON lines: the first says what was evaluated, each further one is a sample,
written as soon as it is judged. What a killed process left of a line is cut off.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from jmoe.data import durable
from jmoe.evals.math500 import Sample


class SampleFile:
    """Appends samples; `known` are those that the file had. Close it.

    Args:
      settings: what samples depend on, as JSON has it. A file can only be gone on with
        by the same.

    Raises:
      ValueError: the file has samples of other settings, or is no such file.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
        self.path = path
        header = json.loads(json.dumps({"settings": dict(settings)}))
        durable.make_directory(path.parent)
        content = path.read_bytes() if path.exists() else b""
        if content:
            whole = content[: content.rfind(b"\n") + 1]
            self.known = _read(path, whole, header)
        else:
            whole, self.known = _line(header), []
        if whole != content:
            durable.write_bytes(path, whole)
        self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, sample: Sample) -> None:
        """Writes a sample; it is in the file when this returns."""
        with durable.naming(self.path):
            self._file.write(_line(sample._asdict()))
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _read(path: pathlib.Path, content: bytes, header: Any) -> list[Sample]:
    try:
        first, *rest = content.splitlines()
        there = json.loads(first)["settings"]
        samples = [Sample(**json.loads(line)) for line in rest]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"out={str(path)!r} isn't a file of samples; it stays as it is."
        ) from error
    wanted = header["settings"]
    for name in {**there, **wanted}:
        if there.get(name) != wanted.get(name):
            raise ValueError(
                f"out={str(path)!r} has samples of {name}={there.get(name)!r}, not "
                f"{wanted.get(name)!r}; name another file, or remove it."
            )
    return samples
