"""Writes weights as safetensors shards, a unit at a time, several units at once.

A unit is read, converted into a buffer that lies as in the file, and written, by one
thread; a few threads keep disk and processor busy. What is in memory is a few units,
whatever the size of model or shard.
"""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jmoe.export import layout, numerics, sources, work
from jmoe.export.files import PAGE, Buffers, Directory
from jmoe.export.layout import SCALE, FileEntry, Shard, Unit
from jmoe.export.names import Tensor
from jmoe.export.numerics import BFLOAT16, FLOAT8, FLOAT32
from jmoe.export.sources import Source
from jmoe.export.work import Budget

SHARD_BYTES = 5_000_000_000

FORMATS = ("float32", "bfloat16", "fp8")  # what a checkpoint may be written in
Advance = Callable[[int], None]  # is told of bytes written


@dataclasses.dataclass(frozen=True)
class Plan:
    """All files of the weights, and the type of each tensor."""

    shards: Sequence[Shard]
    dtypes: Mapping[str, np.dtype]

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def entries(self) -> list[FileEntry]:
        return [entry for shard in self.shards for entry in shard.entries.values()]


def plan(
    tensors: Sequence[Tensor],
    leaf_dtypes: Mapping[str, np.dtype],
    *,
    dtype: str | None,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Lays out a checkpoint.

    Args:
      tensors: of the model, from `names.expand`.
      leaf_dtypes: of our leaves, by path.
      dtype: one of `FORMATS`, or None: every leaf as it is.
    """
    if dtype is not None and dtype not in FORMATS:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(FORMATS)}.")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be at least 1.")
    dtypes = {t.name: _written_as(t, leaf_dtypes[t.path], dtype) for t in tensors}
    itemsizes = {path: found.itemsize for path, found in leaf_dtypes.items()}
    units = layout.units(tensors, itemsizes)
    return Plan(layout.shards(units, dtypes, shard_bytes), dtypes)


def _written_as(tensor: Tensor, leaf: np.dtype, dtype: str | None) -> np.dtype:
    if tensor.is_float32:
        return FLOAT32
    if dtype is None:
        return leaf
    if dtype == "fp8":
        return FLOAT8 if tensor.is_product else BFLOAT16
    return np.dtype(dtype) if dtype == "float32" else BFLOAT16


def identity(made: Plan, source: Source) -> str:
    """Tells this work from any other, so that only the same is gone on with."""
    digest = hashlib.sha256(source.identity.encode())
    for shard in made.shards:
        digest.update(shard.file.encode() + shard.header)
    return digest.hexdigest()


def write(directory: Directory, made: Plan, source: Source, progress: Advance) -> None:
    """Writes every shard that `directory` doesn't have whole already.

    Raises:
      ValueError: weights aren't finite; names the first that was found.
    """
    buffers, budget = Buffers(), Budget()

    def write_shard(shard: Shard) -> None:
        if directory.has(shard.file, shard.size):
            progress(shard.size)
            return

        def one(unit: Unit) -> None:
            with budget.hold(_memory(unit, source)):
                for offset, data in _encoded(unit, shard, source, buffers):
                    file.write(offset, data)
                    progress(len(data))

        with directory.writing(shard.file, shard.size) as file:
            file.write(0, memoryview(shard.header))
            progress(len(shard.header))
            work.each(pool, one, shard.units)

    with (
        concurrent.futures.ThreadPoolExecutor(work.THREADS) as pool,
        concurrent.futures.ThreadPoolExecutor(work.SHARDS_AT_ONCE) as shards,
    ):
        work.each(shards, write_shard, made.shards)


def _memory(unit: Unit, source: Source) -> int:
    """Returns what a unit takes while it is read and converted, at most."""
    return 2 * source.dtypes[unit.path].itemsize * sum(t.size for t in unit.tensors)


def _encoded(
    unit: Unit, shard: Shard, source: Source, buffers: Buffers
) -> Iterator[tuple[int, memoryview]]:
    """Yields the unit's bytes, a contiguous run of the file at a time."""
    runs = _runs(unit, shard)
    size = sum(-(-length // PAGE) + 1 for _, length, _ in runs) * PAGE
    buffer, at = buffers.get(size, 0), 0
    arrays, data = {}, []
    for offset, length, own in runs:
        start = at + offset % PAGE
        data.append((offset, buffer[start : start + length]))
        for entry in own:
            place = start + shard.offsets[entry.name] - offset
            count = entry.nbytes // entry.dtype.itemsize
            flat = np.frombuffer(buffer, entry.dtype, count, place)
            arrays[entry.name] = flat.reshape(entry.shape)
        at = start + length + -(start + length) % PAGE
    _encode(unit, source, arrays)
    yield from data


def _runs(unit: Unit, shard: Shard) -> list[tuple[int, int, list[FileEntry]]]:
    """Returns offset, length and entries of each stretch of the file of the unit."""
    names = [name for t in unit.tensors for name in (t.name, t.name + SCALE)]
    own = sorted(
        (shard.offsets[name], shard.entries[name])
        for name in names
        if name in shard.entries
    )
    runs: list[tuple[int, int, list[FileEntry]]] = []
    for offset, entry in own:
        if runs and runs[-1][0] + runs[-1][1] == offset:
            start, length, before = runs.pop()
            runs.append((start, length + entry.nbytes, [*before, entry]))
        else:
            runs.append((offset, entry.nbytes, [entry]))
    return runs


def _encode(unit: Unit, source: Source, arrays: Mapping[str, np.ndarray]) -> None:
    """Reads the unit and fills the arrays that stand for its part of the file."""
    x = _read_finite(source, unit.path, unit.index)
    scales = None
    if x.dtype == FLOAT8:
        scales = _read_finite(source, sources.scales_path(unit.path), unit.index)
    for tensor in unit.tensors:
        piece = unit.piece(x, tensor)
        out = arrays[tensor.name]
        if scales is not None:
            _encode_kept(out, arrays, tensor, piece, unit.piece(scales, tensor))
        elif out.dtype == FLOAT8:
            numerics.quantize_transposed(out, arrays[tensor.name + SCALE], piece)
        elif tensor.transposed:
            numerics.transpose(out, piece)
        else:
            numerics.copy(out, piece)


def _read_finite(source: Source, path: str, index: sources.Index) -> np.ndarray:
    x = source.read(path, index)
    if not numerics.is_finite(x):
        raise ValueError(
            f"{source.name}: NaN or infinite numbers in {path}, so that nothing was "
            "written."
        )
    return x


def _encode_kept(
    out: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    tensor: Tensor,
    piece: np.ndarray,
    scale: np.ndarray,
) -> None:
    """Converts weights that are FP8 already, to FP8 or to a wider type."""
    if out.dtype == FLOAT8:
        numerics.transpose(out, piece)
        numerics.transpose(arrays[tensor.name + SCALE], scale)
        return
    numerics.dequantize_transposed(out, piece, scale)
