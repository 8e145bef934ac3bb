"""Which tensors a Hugging Face directory has, and where their bytes are.

Only headers are read here. A safetensors file is the length of a JSON header, in 8
bytes, the header, and the tensors one after the other without a gap; so a file that was
cut short, or that isn't what its header says, shows by its size alone.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jmoe.export.layout import CODES, INDEX, SCALE, SINGLE
from jmoe.export.numerics import FLOAT16

CONFIG = "config.json"
DTYPES = {code: dtype for dtype, code in CODES.items()} | {"F16": FLOAT16}

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)" rf"({SCALE})?")
_MAX_HEADER = 100_000_000  # the format's own limit
_LISTED = 20


class Found(NamedTuple):
    """A tensor in a file. dtype is None for a type that jmoe doesn't read."""

    file: pathlib.Path
    offset: int  # in the file
    nbytes: int
    shape: tuple[int, ...]
    code: str  # "BF16"

    @property
    def dtype(self) -> np.dtype | None:
        return DTYPES.get(self.code)


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the directory's config.json.

    Raises:
      FileNotFoundError: there is no such directory, or no config.json in it.
      ValueError: it isn't a JSON object.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"model={str(directory)!r} is not a directory.")
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"model={str(directory)!r} has no {CONFIG}.")
    return _read_object(path)


def read_headers(directory: pathlib.Path) -> dict[str, Found]:
    """Returns every tensor by name, from the directory's index or its only file.

    Raises:
      FileNotFoundError: there are no weights, or not all files of the index.
      ValueError: a file is cut short or corrupt, or the index is wrong.
    """
    index_path = directory / INDEX
    if not index_path.is_file():
        return read_header(_only_file(directory))
    weight_map = _read_object(index_path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"{index_path} has no weight_map.")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of the {len(names)} files of its "
            f"{INDEX}: {_listed(missing)}."
        )
    found: dict[str, Found] = {}
    wrong = []
    for name in names:
        header = read_header(directory / name)
        claimed = {tensor for tensor, file in weight_map.items() if file == name}
        wrong += [f"{tensor} isn't in {name}" for tensor in claimed - header.keys()]
        wrong += [
            f"{tensor} of {name} is not in it" for tensor in header.keys() - claimed
        ]
        found |= header
    if wrong:
        raise ValueError(f"{index_path} is wrong: {_listed(sorted(wrong))}.")
    return found


def read_header(path: pathlib.Path) -> dict[str, Found]:
    """Returns one file's tensors; ValueError if it isn't a whole safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} is cut short or no safetensors file: it has {size} bytes and "
                f"its header would have {length}."
            )
        text = file.read(length)
    try:
        described = json.loads(text)
        tensors = {
            name: _found(path, 8 + length, row)
            for name, row in described.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} has a corrupt header: {error}.") from None
    _check_extent(path, size, 8 + length, tensors)
    return tensors


def split_experts(found: Mapping[str, Found]) -> dict[str, Found]:
    """Returns tensors with each expert's by name where a file has a layer's as one.

    `experts.gate_up_proj` [experts, 2 * mlp, hidden] and `experts.down_proj` [experts,
    hidden, mlp] are what transformers 5 has in memory, and writes on request. Every
    expert's part is a range of the bytes. Block scales go the same way, unless a block
    has rows of both gate and up.
    """
    split: dict[str, Found] = {}
    for name, tensor in found.items():
        match = _FUSED.fullmatch(name)
        split |= _experts(tensor, *match.groups("")) if match else {name: tensor}
    return split


def _experts(tensor: Found, block: str, kind: str, scale: str) -> dict[str, Found]:
    parts = kind.split("_")[:-1]  # of "gate_up_proj"
    whole = f"{block}.{kind}{scale}"
    if len(tensor.shape) != 3 or not tensor.shape[0] or tensor.shape[1] % len(parts):
        return {whole: tensor}  # misshapen: the check will say so
    experts, rows, columns = tensor.shape
    nbytes = tensor.nbytes // experts // len(parts)
    suffix = f".weight{scale}"
    return {
        f"{block}.{expert}.{part}_proj{suffix}": tensor._replace(
            offset=tensor.offset + (expert * len(parts) + place) * nbytes,
            nbytes=nbytes,
            shape=(rows // len(parts), columns),
        )
        for expert in range(experts)
        for place, part in enumerate(parts)
    }


def _found(path: pathlib.Path, start: int, row: Mapping[str, Any]) -> Found:
    begin, end = row["data_offsets"]
    shape = tuple(int(size) for size in row["shape"])
    found = Found(path, start + begin, end - begin, shape, str(row["dtype"]))
    if found.dtype is not None:
        nbytes = math.prod(shape) * found.dtype.itemsize
        if nbytes != found.nbytes:
            raise ValueError(f"{nbytes} bytes of shape have {found.nbytes} of data")
    return found


def _check_extent(
    path: pathlib.Path, size: int, start: int, tensors: Mapping[str, Found]
) -> None:
    """Checks that the tensors fill the file, one after the other."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][1:3]):
        if tensor.offset != end:
            raise ValueError(
                f"{path} has a corrupt header: {name} begins at byte {tensor.offset}, "
                f"not {end}."
            )
        end += tensor.nbytes
    if end != size:
        what = "is cut short" if size < end else "goes on after its last tensor"
        raise ValueError(f"{path} {what}: it has {size} bytes, not {end}.")


def _only_file(directory: pathlib.Path) -> pathlib.Path:
    if (directory / SINGLE).is_file():
        return directory / SINGLE
    found = sorted(directory.glob("*.safetensors"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{directory} has neither {SINGLE} nor {INDEX}, and "
            f"{len(found)} other safetensors files."
        )
    return found[0]


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


def _listed(items: list[str]) -> str:
    more = len(items) - _LISTED
    return "; ".join(items[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
