"""A disk without room: after some bytes, for what Python writes below a directory; or
for files beyond a size, whoever in this process writes them.

    with full.Disk(tmp_path, room=1000) as disk:
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path)
        disk.room += 1000
        write(tmp_path)

As on a real one, a write may be short, the next one raises ENOSPC, and neither knows
the file's name. What is written past it (through a map, by NumPy's `tofile`) isn't
stopped, as nothing stops it in time on a real one; it is found at the end, by the size
of what is there.
"""

import builtins
import contextlib
import errno
import io
import os
import pathlib
import resource
from collections.abc import Iterator
from typing import Any


class Disk:
    """Full once `room` bytes were written below `root`; removing gives none back."""

    def __init__(self, root: pathlib.Path, room: int):
        self.root = root.absolute()
        self.room = room
        self.written = 0

    def __enter__(self) -> "Disk":
        self._open = io.open
        self._before = _size(self.root)
        io.open = builtins.open = self._watched
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        io.open = builtins.open = self._open
        past = _size(self.root) - self._before - self.written
        assert kind is not None or past <= 0, f"{past} bytes were written past it"

    def take(self, wanted: int) -> int:
        """How many bytes of these there is room for; raises if there is none."""
        given = min(wanted, self.room)
        if wanted and not given:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= given
        self.written += given
        return given

    def _watched(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        **options: Any,
    ) -> Any:
        is_below = not isinstance(file, int) and pathlib.Path(
            os.fsdecode(file)
        ).absolute().is_relative_to(self.root)
        if not is_below or not set(mode) & set("wax+"):
            return self._open(
                file, mode, buffering, encoding, errors, newline, **options
            )
        raw = _Raw(file, mode.replace("b", "").replace("t", ""))
        raw.disk = self
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)


class _Raw(io.FileIO):
    disk: Disk

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        return super().write(data[: self.disk.take(len(data))])


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may become larger: EFBIG, from the system, at whatever writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _size(root: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
