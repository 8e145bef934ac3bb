"""A directory that appears when it is whole, and files that are written in big pieces.

`OUT` is made as `OUT.partial` beside it and gets its name last, so that a directory cut
short by a crash or a full disk can't be taken for a checkpoint. What has been finished
of it is kept: a journal says which files are whole, with a checksum of every piece. Who
starts the same work again goes on there, once the sums have been compared.

Large pieces go past the page cache where the system allows (`O_DIRECT`): the disk then
takes them as fast as it can, at no cost to a processor that has weights to transpose.
"""

import concurrent.futures
import contextlib
import errno
import json
import mmap
import os
import pathlib
import shutil
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jmoe.checkpoint import lock
from jmoe.data import durable

PAGE = 4096
PARTIAL = ".partial"
JOURNAL = "journal.jsonl"

_READ_BYTES = 16 << 20
_KEPT_BYTES = 48 << 20  # of a thread's buffer
_SMALL = 1 << 16
_DIRECT = getattr(os, "O_DIRECT", 0)


class File:
    """A file of known size, written in any order by any threads, then closed.

    Raises OSError if the disk has no room for it, before anything is written.
    """

    def __init__(self, path: pathlib.Path, size: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.size = size
        self.sums: list[tuple[int, int, int]] = []  # offset, length, CRC-32
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._direct_fd = _open_direct(path, os.O_WRONLY)
        try:
            _allocate(self._fd, size)
        except OSError:
            self.discard()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """Writes `data`, and keeps its sum.

        Past the page cache goes what fills whole pages, if `data` lies in memory as in
        the file: at a multiple of `PAGE` plus the same remainder.
        """
        self.sums.append((offset, len(data), zlib.crc32(data)))
        first = -offset % PAGE
        last = first + (len(data) - first) // PAGE * PAGE
        if self._direct_fd is None or last <= first or not _is_aligned(data[first:]):
            first = last = len(data)
        if last > first:
            assert self._direct_fd is not None
            _write_all(self._direct_fd, data[first:last], offset + first)
        _write_all(self._fd, data[:first], offset)
        _write_all(self._fd, data[last:], offset + last)

    def close(self) -> None:
        """Returns when the file is on the disk."""
        os.fsync(self._fd)
        self._close()

    def discard(self) -> None:
        """Leaves nothing of it."""
        self._close()
        self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd is not None:
                os.close(fd)


class Files:
    """Files that stay open, read at any place by any thread."""

    def __init__(self):
        self._fds: dict[pathlib.Path, tuple[int, int | None]] = {}
        self._maps: dict[pathlib.Path, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(
        self, path: pathlib.Path, offset: int, length: int, buffers: "Buffers"
    ) -> memoryview:
        """Returns `length` bytes, past the page cache if many; valid till the next."""
        fd, direct_fd = self._opened(path)
        start = offset // PAGE * PAGE
        data = buffers.get(offset - start + length + PAGE, 0)
        size = -(-(offset - start + length) // PAGE) * PAGE
        if (
            direct_fd is None
            or length < _SMALL
            or not _read_all(direct_fd, data[:size], start, offset - start + length)
        ):
            if not _read_all(fd, data[:size], start, offset - start + length):
                raise ValueError(f"{path} was cut short while it was read.")
        return data[offset - start : offset - start + length]

    def mapped(self, path: pathlib.Path) -> np.ndarray:
        """Returns the file's bytes, read when they are touched."""
        with self._lock:
            if path not in self._maps:
                self._maps[path] = np.memmap(path, np.uint8, mode="r")
            return self._maps[path]

    def close(self) -> None:
        for pair in self._fds.values():
            for fd in filter(None, pair):
                os.close(fd)
        self._fds.clear()
        self._maps.clear()

    def _opened(self, path: pathlib.Path) -> tuple[int, int | None]:
        with self._lock:
            if path not in self._fds:
                plain = os.open(path, os.O_RDONLY)
                self._fds[path] = plain, _open_direct(path, os.O_RDONLY)
            return self._fds[path]


class Directory:
    """`out` in the making; a context manager, which an error leaves unpublished.

    While it is entered, no other process makes the same `out`. After a ValueError, that
    is if what was read is wrong, nothing is kept. After any other error, such as a full
    disk, the files that are whole are.

    Args:
      out: must not be there yet.
      work: what is being made of what, as text. A partial directory of the same work
        is gone on with, one of other work is begun anew.

    Raises on entering:
      ValueError: `out` is there, or is being made by another process.
    """

    def __init__(self, out: pathlib.Path, work: str):
        self.out = pathlib.Path(os.path.abspath(out))
        self.partial = self.out.with_name(self.out.name + PARTIAL)
        self._work = work
        self._journal = self.partial / JOURNAL
        self._lock = threading.Lock()
        self._whole: dict[str, dict[str, Any]] = {}
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Directory":
        with contextlib.ExitStack() as held:
            path = self.partial.with_name(self.partial.name + lock.FILE)
            held.enter_context(lock.hold(path, f"out={str(self.out)!r}"))
            if self.out.exists():
                raise ValueError(
                    f"out={str(self.out)!r} exists already; choose another."
                )
            self._whole = self._resume(self._work)
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._held:
            if kind is not None and (issubclass(kind, ValueError) or not self._whole):
                shutil.rmtree(self.partial, ignore_errors=True)

    def _resume(self, work: str) -> dict[str, dict[str, Any]]:
        rows = _read_rows(self._journal)
        begun = {durable.unfinished(self._journal).name}  # all there was time for
        if not rows and set(_names(self.partial)) - begun:
            raise ValueError(
                f"{self.partial} is in the way, and was not left by an interrupted "
                "export or import; remove it or choose another out."
            )
        if not rows or rows[0].get("work") != work:
            shutil.rmtree(self.partial, ignore_errors=True)
            durable.make_directory(self.partial)
            rows = [{"work": work}]
        # Anew, as a line that was cut short would spoil the next one.
        durable.write_text(
            self._journal, "".join(json.dumps(row) + "\n" for row in rows)
        )
        return {row["file"]: row for row in rows[1:]}

    def require_room(self, total: int) -> None:
        """Raises OSError unless the disk has room for the rest of `total` bytes."""
        size = total - sum(row["size"] for row in self._whole.values())
        free = shutil.disk_usage(self.partial).free
        if free < size:
            raise OSError(
                errno.ENOSPC,
                f"{self.out} needs {size / 1e9:.2f} GB more, and the disk has "
                f"{free / 1e9:.2f} GB free",
            )

    def has(self, name: str, size: int) -> bool:
        """Returns whether an earlier attempt finished this file, which is as it was."""
        row = self._whole.get(name)
        path = self.partial / name
        if row is None or row["size"] != size or not path.is_file():
            return False
        return path.stat().st_size == size and _sums_hold(path, row["sums"])

    @contextlib.contextmanager
    def writing(self, name: str, size: int) -> Iterator[File]:
        """Yields a new file of the directory, whole when the context ends; else none.

        Data is on the disk before the journal says so: a note is always true.
        """
        with _explained(self.partial, size):
            file = File(self.partial / name, size)
        try:
            yield file
        except BaseException:
            file.discard()
            raise
        with _explained(self.partial, size):
            file.close()
            row = {"file": name, "size": size, "sums": file.sums}
            self._add_row(row)
            self._whole[name] = row

    def sums(self, name: str) -> list[list[int]]:
        """Returns each piece's offset, length and CRC-32, of a whole file."""
        return self._whole[name]["sums"]

    def write_text(self, name: str, text: str) -> None:
        """Writes UTF-8 as `write_bytes` does."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a small file, anew in every attempt."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _explained(self.partial, len(content)):
            durable.write_bytes(path, content)

    def publish(self) -> None:
        """Gives the directory its name, and only then forgets how it was made."""
        durable.publish(self.partial, self.out)
        (self.out / JOURNAL).unlink()

    def _add_row(self, row: dict[str, Any]) -> None:
        with self._lock, self._journal.open("a") as journal:
            journal.write(json.dumps(row) + "\n")


class Buffers:
    """Gives each thread a buffer that begins at a page and is used again."""

    def __init__(self):
        self._local = threading.local()

    def get(self, size: int, remainder: int) -> memoryview:
        """Returns `size` bytes at an address with this remainder modulo `PAGE`."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size + PAGE:
            buffer = mmap.mmap(-1, max(size + PAGE, _KEPT_BYTES))
            if len(buffer) == _KEPT_BYTES:
                self._local.buffer = buffer
        return memoryview(buffer)[remainder : remainder + size]


@contextlib.contextmanager
def _explained(partial: pathlib.Path, size: int) -> Iterator[None]:
    """Says of a full disk what it means here."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"The disk is full: {partial} lacks room for {size:,} bytes. What is whole "
            "stays there; with more room the same command goes on from it",
        ) from error


def _open_direct(path: pathlib.Path, mode: int) -> int | None:
    if not _DIRECT:
        return None
    try:
        return os.open(path, mode | _DIRECT)
    except OSError:  # a file system without it
        return None


def _allocate(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)


def _is_aligned(data: memoryview) -> bool:
    return np.frombuffer(data, np.uint8).ctypes.data % PAGE == 0


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _read_all(fd: int, out: memoryview, offset: int, needed: int) -> bool:
    """Fills `out`, whose end may be past the file's; whether `needed` bytes came."""
    while needed > 0:
        try:
            count = os.preadv(fd, [out], offset)
        except OSError as error:
            if error.errno == errno.EINVAL:  # direct reads that the disk won't do
                return False
            raise
        if not count:
            return False
        out, offset, needed = out[count:], offset + count, needed - count
    return True


def _sums_hold(path: pathlib.Path, sums: list[list[int]]) -> bool:
    with path.open("rb") as file, concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda row: _crc(file.fileno(), row[0], row[1]), sums)
        return all(crc == row[2] for crc, row in zip(found, sums, strict=True))


def _crc(fd: int, offset: int, length: int) -> int:
    crc = 0
    while length:
        chunk = os.pread(fd, min(length, _READ_BYTES), offset)
        if not chunk:
            return -1
        crc = zlib.crc32(chunk, crc)
        offset, length = offset + len(chunk), length - len(chunk)
    return crc


def _names(directory: pathlib.Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []


def _read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the journal's rows; a last one that was cut short doesn't count."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in path.read_text().splitlines():
            rows.append(json.loads(line))
    return rows
