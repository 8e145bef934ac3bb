"""CRC-32 of a checkpoint's files, shared out over processes and threads by bytes.

A sum is of a range of a file, since one file may hold most of a checkpoint. Sums of
neighbouring ranges give that of both: bits are coefficients of a polynomial modulo
CRC-32's, and to let n bytes follow is to multiply by x^(8n) (Adler's `crc32_combine`
in zlib).

Where several processes write a checkpoint, each reads its own files as it has written
them, most likely from memory, and leaves their sums beside them for process 0 to put
into the manifest.
"""

import concurrent.futures
import functools
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from jmoe.data import durable

_LEFT = "sums.json"  # in the directory of one process
_BLOCK_BYTES = 64 << 20  # for one thread at a time
_CHUNK_BYTES = 1 << 20
_POLYNOMIAL = 0xEDB88320  # CRC-32's. The highest bit is the coefficient of x^0.
_ONE = 1 << 31
_X8 = 1 << 23


class Checksum(NamedTuple):
    """How many bytes of a file were read, in a row, and their sum; None if it is gone.

    JSON makes a list of it, which will do as well.
    """

    name: str
    size: int
    crc: int | None


def read(
    directory: pathlib.Path, sizes: Mapping[str, int], index: int = 0, count: int = 1
) -> list[Checksum]:
    """Reads share `index` of `count` equal shares of all bytes of these files.

    Args:
      sizes: in bytes, by path below `directory`; the same for all shares.

    Returns:
      What was read, in the order of `sizes`; that of all shares in a row is for `join`.
    """
    blocks = list(_blocks(sizes, index, count))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        parts = pool.map(lambda block: _read_block(directory, *block), blocks)
        return [Checksum(name, *pair) for name, pair in join(parts).items()]


def join(parts: Iterable[Checksum]) -> dict[str, tuple[int, int | None]]:
    """Returns size and sum of each file of which there are parts, in their order."""
    files: dict[str, tuple[int, int | None]] = {}
    for name, size, crc in parts:
        size_before, before = files.get(name, (0, 0))
        both = None
        if before is not None and crc is not None:
            both = combine(before, crc, size)
        files[name] = size_before + size, both
    return files


def combine(first: int, second: int, second_size: int) -> int:
    """Returns the CRC-32 of bytes with sum `first`, followed by those of `second`."""
    return _multiply(_power_of_x8(second_size), first) ^ second


def of_files(directory: pathlib.Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Returns [bytes, CRC-32] of files by their paths below `directory`."""
    sizes = {name: (directory / name).stat().st_size for name in names}
    files = {name: [0, 0] for name in sizes}
    for name, (size, crc) in join(read(directory, sizes)).items():
        assert crc is not None, f"{directory / name} went while it was read"
        files[name] = [size, crc]
    return files


def names(directory: pathlib.Path) -> list[str]:
    """Returns the paths of all files below `directory`."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def leave(directory: pathlib.Path) -> None:
    """Sums what one process has written to `directory`, for `collect`."""
    if directory.is_dir():  # a process may hold nothing that another hasn't written
        durable.sync_tree(directory)
        text = json.dumps(of_files(directory, names(directory)))
        (directory / _LEFT).write_text(text)


def collect(directory: pathlib.Path) -> dict[str, list[int]]:
    """Takes away what `leave` left in directories of `directory`, by process."""
    files: dict[str, list[int]] = {}
    left = directory.glob(f"*/{_LEFT}")
    for path in sorted(left, key=lambda path: (len(path.parent.name), path)):
        found = json.loads(path.read_text())
        files |= {f"{path.parent.name}/{name}": pair for name, pair in found.items()}
        path.unlink()
    return files


def _blocks(
    sizes: Mapping[str, int], index: int, count: int
) -> Iterator[tuple[str, int, int]]:
    """Yields name, start and stop of what one thread reads at a time."""
    total = sum(sizes.values())
    first, last = total * index // count, total * (index + 1) // count
    at = 0
    for name, size in sizes.items():
        start, stop = max(first - at, 0), min(last - at, size)
        for block in range(start, stop, _BLOCK_BYTES):
            yield name, block, min(block + _BLOCK_BYTES, stop)
        at += size


def _read_block(directory: pathlib.Path, name: str, start: int, stop: int) -> Checksum:
    crc, at = 0, start
    try:
        with (directory / name).open("rb", buffering=0) as file:
            file.seek(start)
            while chunk := file.read(min(_CHUNK_BYTES, stop - at)):
                crc = zlib.crc32(chunk, crc)  # while other threads run
                at += len(chunk)
    except FileNotFoundError:  # as another process removed it
        return Checksum(name, 0, None)
    return Checksum(name, at - start, crc)


@functools.lru_cache(1 << 12)
def _power_of_x8(exponent: int) -> int:
    """Returns x^(8 exponent) by repeated squaring."""
    power, square = _ONE, _X8
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        exponent >>= 1
    return power


def _multiply(a: int, b: int) -> int:
    """Returns the product of two polynomials modulo CRC-32's."""
    product, bit = 0, _ONE
    while bit:
        if a & bit:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
        bit >>= 1
    return product
