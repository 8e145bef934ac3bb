"""Arrays of one dimension on disk: written by plain writes, read through maps, with
sums that tell whether they are still what was written.

Shapes: N numbers.
"""

import concurrent.futures
import pathlib
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from jmoe.data import durable

_BUFFER_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 26  # that a sum is of


class Seal(NamedTuple):
    """What a file was when it was written.

    mtime_ns: with the size, enough to know a file by that nobody has written to since,
    as git does. sums: CRC-32 of each of its blocks.
    """

    size: int
    mtime_ns: int
    sums: list[int]


def write(
    path: pathlib.Path, dtype: DTypeLike, length: int, parts: Iterable[np.ndarray]
) -> None:
    """Writes an array [`length`] in NumPy's format, of `parts` that follow each other.

    Raises:
      OSError: the disk has no room; names `path`.
    """
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": description, "fortran_order": False, "shape": (length,)}
    written = 0
    with durable.naming(path), path.open("wb", buffering=_BUFFER_BYTES) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part_N in parts:
            file.write(np.ascontiguousarray(part_N, dtype).data)
            written += len(part_N)
    assert written == length


def read(path: pathlib.Path) -> np.ndarray:
    """Returns the array as a map of the file, which nothing can be written through."""
    return np.load(path, mmap_mode="r")


def seal(path: pathlib.Path) -> Seal:
    """Reads a file whole, several blocks at once, and returns what it is."""
    stat = path.stat()
    starts = range(0, stat.st_size, _BLOCK_BYTES)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = pool.map(lambda start: _block_sum(path, start), starts)
        return Seal(stat.st_size, stat.st_mtime_ns, list(sums))


def is_untouched(path: pathlib.Path, sealed: Seal) -> bool:
    """Returns whether the file has its size and its time, and needn't be read."""
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (sealed.size, sealed.mtime_ns)


def _block_sum(path: pathlib.Path, start: int) -> int:
    with path.open("rb") as file:
        file.seek(start)
        return zlib.crc32(file.read(_BLOCK_BYTES))
