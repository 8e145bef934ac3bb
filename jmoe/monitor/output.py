"""What a run writes besides its checkpoints, and outlives: logs and its own output.

A disk that is full, or a reader of a pipe that has gone, is told of in one warning, and
in another one when it works again.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any, TextIO

from absl import logging

from jmoe.data import durable

_KEPT_BYTES = 1 << 25


class Troubled:
    """Something that may fail, as long as it is told of.

    Args:
      what: names it in warnings.
    """

    def __init__(self, what: str):
        self._what = what
        self._is_failing = False

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> bool:
        """Calls `action`; whether it raised no OSError, which shows that it works."""
        works = self.spare(action, *arguments)
        if works and self._is_failing:
            self._is_failing = False
            logging.warning("%s can be written again.", self._what)
        return works

    def spare(self, action: Callable[..., Any], *arguments: Any) -> bool:
        """Calls `action`; whether it raised no OSError, which shows nothing."""
        try:
            action(*arguments)
        except OSError as error:
            if not self._is_failing:
                logging.warning(
                    "%s can't be written, and the run goes on without it: %s",
                    self._what,
                    error,
                )
            self._is_failing = True
            return False
        return True


class Lines:
    """Appends lines to a file. What it can't write it keeps for later, up to 32 MiB.

    Every line is with the system when `add` returns, so a crash loses none.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._trouble = Troubled(str(path))
        durable.sync(path.parent)

    def add(self, line: str) -> bool:
        """Returns whether it and all before it are written."""
        content = line.encode() + b"\n"
        if len(self._unwritten) + len(content) > _KEPT_BYTES:
            self._trouble.attempt(self._write)
        if len(self._unwritten) + len(content) <= _KEPT_BYTES:
            self._unwritten += content  # else it is lost, but none is ever half there
        return self._trouble.attempt(self._write)

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        self._trouble.attempt(self._write_and_sync)

    def close(self) -> None:
        """Closes the file; what could not be written is lost."""
        self._trouble.attempt(self._write)
        self._file.close()

    def _write(self) -> None:
        with durable.naming(self._path):
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]

    def _write_and_sync(self) -> None:
        self._write()
        with durable.naming(self._path):
            os.fsync(self._file.fileno())


class Forgiving:
    """A stream, such as standard output, that raises no OSError when it is written."""

    def __init__(self, stream: TextIO, what: str):
        self._stream = stream
        self._trouble = Troubled(what)

    def write(self, text: str) -> int:
        self._trouble.spare(self._stream.write, text)  # into a buffer
        return len(text)

    def flush(self) -> None:
        self._trouble.attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
