"""Which bytes of which file each tensor gets, before any of them is written.

A unit is what is read and converted at once: consecutive pieces of one leaf, such as a
few experts of one layer. A shard is a safetensors file (its length as 8 bytes, a JSON
header, the tensors without gaps); no unit is split between two. Within a shard wider
types come first, so that every tensor is aligned to its type, and the first one begins
at a page, so that units can be written past the page cache.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jmoe.export import numerics
from jmoe.export.files import PAGE
from jmoe.export.names import Tensor
from jmoe.export.numerics import BFLOAT16, FLOAT8, FLOAT32

UNIT_BYTES = 32 << 20
SCALE = "_scale_inv"  # what Hugging Face appends to the name of an FP8 weight
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

CODES = {FLOAT32: "F32", BFLOAT16: "BF16", FLOAT8: "F8_E4M3"}  # in the header


@dataclasses.dataclass(frozen=True)
class Unit:
    """Pieces of one leaf that are handled together.

    index: selects them in the leaf, by its leading dimensions.
    """

    path: str
    index: tuple[int | slice, ...]
    tensors: tuple[Tensor, ...]

    def piece(self, x: np.ndarray, tensor: Tensor) -> np.ndarray:
        """Returns the tensor's part of the unit's array, a matrix as [in, out]."""
        if tensor.expert is not None:
            first = self.tensors[0].expert
            assert first is not None
            x = x[tensor.expert - first]
        if tensor.half is not None:
            x = x[:, tensor.half]
        return x.reshape(len(x), -1) if tensor.transposed else x.reshape(tensor.shape)


class FileEntry(NamedTuple):
    """One array of a safetensors file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file: its units, and where in it each entry begins."""

    file: str
    units: tuple[Unit, ...]
    entries: Mapping[str, FileEntry]
    offsets: Mapping[str, int]  # in the file
    header: bytes
    size: int


def units(tensors: Iterable[Tensor], itemsizes: Mapping[str, int]) -> Iterator[Unit]:
    """Groups tensors that lie side by side in one leaf, up to `UNIT_BYTES`.

    Args:
      itemsizes: bytes of a number, for each leaf's path.
    """
    group: list[Tensor] = []
    for tensor in tensors:
        if group and not _goes_with(tensor, group, itemsizes[tensor.path]):
            yield _unit(group)
            group = []
        group.append(tensor)
    if group:
        yield _unit(group)


def _goes_with(tensor: Tensor, group: Sequence[Tensor], itemsize: int) -> bool:
    first = group[0]
    if (tensor.path, tensor.layer) != (first.path, first.layer) or tensor.is_copy:
        return False
    if tensor.expert in (None, group[-1].expert):
        return True  # two halves are never torn apart
    return (len(group) + 2) * tensor.size * itemsize <= UNIT_BYTES


def _unit(group: Sequence[Tensor]) -> Unit:
    first, last = group[0], group[-1]
    index: tuple[int | slice, ...] = () if first.layer is None else (first.layer,)
    if first.expert is not None and last.expert is not None:
        index += (slice(first.expert, last.expert + 1),)
    return Unit(first.path, index, tuple(group))


def entries(tensor: Tensor, dtype: np.dtype) -> Iterator[FileEntry]:
    """Yields the tensor, and its block scales if it is FP8."""
    yield FileEntry(tensor.name, dtype, tensor.shape)
    if dtype == FLOAT8:
        shape = tuple(map(numerics.blocks, tensor.shape))
        yield FileEntry(tensor.name + SCALE, FLOAT32, shape)


def shards(
    all_units: Iterable[Unit], dtypes: Mapping[str, np.dtype], shard_bytes: int
) -> list[Shard]:
    """Returns files of about `shard_bytes`, in the order of the units.

    Args:
      dtypes: of each tensor, by its name.
    """
    groups: list[list[tuple[Unit, list[FileEntry]]]] = [[]]
    filled = 0
    for unit in all_units:
        own = [entry for t in unit.tensors for entry in entries(t, dtypes[t.name])]
        nbytes = sum(entry.nbytes for entry in own)
        if filled and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((unit, own))
        filled += nbytes
    total = len(groups)
    names = [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    if total == 1:
        names = [SINGLE]
    return [_shard(*pair) for pair in zip(names, groups, strict=True)]


def _shard(file: str, group: Sequence[tuple[Unit, Sequence[FileEntry]]]) -> Shard:
    found = [entry for _, own in group for entry in own]
    found.sort(key=lambda entry: -entry.dtype.itemsize)
    described, starts, end = {}, {}, 0
    for entry in found:
        starts[entry.name] = end
        end += entry.nbytes
        described[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [starts[entry.name], end],
        }
    header = _header(described)
    return Shard(
        file=file,
        units=tuple(unit for unit, _ in group),
        entries={entry.name: entry for entry in found},
        offsets={name: len(header) + start for name, start in starts.items()},
        header=header,
        size=len(header) + end,
    )


def _header(described: Mapping[str, object]) -> bytes:
    """Returns the header with blanks behind the JSON up to a page's end.

    The format allows them.
    """
    metadata = {"__metadata__": {"format": "pt"}}
    text = json.dumps(metadata | dict(described), separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return len(text).to_bytes(8, "little") + text


def index_json(files: Sequence[Shard]) -> str:
    """Returns what says which file holds which tensor."""
    weight_map = {name: shard.file for shard in files for name in shard.entries}
    total = sum(e.nbytes for shard in files for e in shard.entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
