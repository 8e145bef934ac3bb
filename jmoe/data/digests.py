"""SHA-256 of files, which are read when they have changed and not at every start.

What was read is kept beside the other caches, under the file's path, with its size,
times and inode. Times tell of a change only if their clock has ticked since: a file
that is read in the tick in which it was written may be written again without a sign
("Racy Git", in Git's technical documentation). So files that have just been written
are read each time.
"""

import functools
import hashlib
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

from absl import logging

from jmoe.data import cache

# Ticks are up to 2 s long, and the clock of the host that has the files may be slow.
_SETTLED_NS = 10 * 10**9


class _Stamp(NamedTuple):
    """What can't stay the same where a file is written to or another takes its name."""

    size: int
    mtime_ns: int
    ctime_ns: int  # of the last change, whatever `touch` or `cp -p` say
    inode: int


def sha256(path: pathlib.Path, directory: pathlib.Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's content.

    Args:
      directory: where caches lie.
    """
    start_ns = time.time_ns()
    stamp = _stamp(path)
    if max(stamp.mtime_ns, stamp.ctime_ns) > start_ns - _SETTLED_NS:
        return _read(path)
    return _remembered(path.absolute(), stamp, directory)


@functools.cache  # where nothing can be written, a process reads a file only once
def _remembered(path: pathlib.Path, stamp: _Stamp, directory: pathlib.Path) -> str:
    entry = directory / "digests" / cache.key(str(path))
    digest = _recall(entry, path, stamp)
    if digest is not None:
        return digest
    digest = _read(path)
    if _stamp(path) == stamp:
        _keep(entry, _record(path, stamp, digest))
    return digest


def _stamp(path: pathlib.Path) -> _Stamp:
    stat = path.stat()
    return _Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def _read(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(path: pathlib.Path, stamp: _Stamp, digest: str) -> dict[str, Any]:
    check = cache.key(str(path), *stamp, digest)
    return {"path": str(path), "stamp": [*stamp], "sha256": digest, "check": check}


def _recall(entry: pathlib.Path, path: pathlib.Path, stamp: _Stamp) -> str | None:
    """Returns what was kept of this file as it is; None if missing or damaged."""
    try:
        found = json.loads(entry.read_bytes())
        digest = found["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return digest if found == _record(path, stamp, digest) else None


def _keep(entry: pathlib.Path, record: dict[str, Any]) -> None:
    made = entry.with_name(f"{entry.name}.{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps(record))
        made.replace(entry)
    except OSError as error:
        logging.warning("%s will be read again at the next start: %s", entry, error)
