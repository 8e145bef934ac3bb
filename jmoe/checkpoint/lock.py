"""One writer at a time: a lock that ends with the process that holds it.

The system holds it (`flock`) for as long as the file is open, so that neither a killed
process nor a lost machine leaves a lock behind. What the file says only tells others
whose it is.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

from absl import logging

FILE = ".lock"  # in a directory that one run writes to


@contextlib.contextmanager
def hold(path: pathlib.Path, what: str) -> Iterator[None]:
    """Holds the lock file `path`, made with its directory, while the block runs.

    Where the file system has no locks it warns, and goes on.

    Args:
      what: names what is locked, in errors.

    Raises:
      ValueError: another holds it; names the host and process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, what) as file:
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def require_free(path: pathlib.Path, what: str) -> None:
    """Raises ValueError as `hold` does; removes what a dead process left."""
    if path.exists():
        with hold(path, what):
            pass


def _locked(path: pathlib.Path, what: str) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = _holder(file.read())
            raise ValueError(
                f"{what} is being written to by {holder}. Wait for it, end it, or "
                "choose another place."
            ) from None
        except OSError as error:
            logging.warning(
                "%s can't be locked (%s): let no other process write to %s.",
                path,
                error,
                what,
            )
        if _is_at(file, path):
            return file
        file.close()  # whose lock it was has removed it since it was opened


def _is_at(file: TextIO, path: pathlib.Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on host {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # that has the lock, and will say so in a moment
