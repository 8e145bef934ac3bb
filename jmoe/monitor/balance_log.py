"""balance.npy: each expert's load and selection bias over time, an array that grows.

    np.load("balance.npy", mmap_mode="r")["load_LE"]  # [N, L, E]

It is an array of NumPy's own format, with a record for each log: "step", "load_LE",
"bias_LE". Records are appended, and the number of them in the header, where NumPy
leaves room for it, is raised behind each. All are of one size, so that any is found
without reading the others.

A report shows some hundred logs of a run at most. So where a record is large, as
DeepSeek-V3's with 119 kB, only every n-th log has one.

Shapes: N records, L MoE layers, E routed experts.
"""

import bisect
import math
import os
import pathlib
import tokenize
from typing import BinaryIO, NamedTuple

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from jmoe.data import durable

_BYTES_A_LOG = 24_000  # on average
_NEVER = 1 << 63  # the step of a record of which a power cut has left zeros only


class _Header(NamedTuple):
    dtype: np.dtype
    start: int  # of the records
    count: int


class BalanceLog:
    """Appends to a file of balance.

    Args:
      path: of the file, made if absent.
      start_step: records of later steps are dropped.
    """

    def __init__(self, path: pathlib.Path, *, start_step: int):
        path.touch()
        self._file = path.open("r+b")
        durable.sync(path.parent)
        self._header: _Header | None = None
        self._logs = 0
        try:
            header = _read_header(self._file)
        except ValueError as error:
            if path.stat().st_size:
                logging.warning("%s can't be read, and begins anew: %s", path, error)
            self._file.truncate(0)
        else:
            self._cut(header, start_step)

    def append(self, step: int, load_LE: ArrayLike, bias_LE: ArrayLike) -> None:
        """Writes a record, if this log has one; it can be read when this returns."""
        if self._header is None:
            self._header = self._write_header(_dtype(*np.shape(load_LE)), 0)
        dtype, start, count = self._header
        every = math.ceil(dtype.itemsize / _BYTES_A_LOG)
        self._logs += 1
        if (self._logs - 1) % every:
            return
        record = np.zeros((), dtype)
        record["step"], record["load_LE"], record["bias_LE"] = step, load_LE, bias_LE
        self._file.seek(start + count * dtype.itemsize)
        self._file.write(record.tobytes())
        self._file.flush()  # before the header counts it
        self._header = self._write_header(dtype, count + 1)

    def sync(self) -> None:
        """Returns when all records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _cut(self, header: _Header, start_step: int) -> None:
        """Finds the place by halving: steps ascend."""
        dtype, start, count = header

        def step(at: int) -> int:
            self._file.seek(start + at * dtype.itemsize)
            found = int.from_bytes(self._file.read(8), "little", signed=True)
            return found or _NEVER

        kept = bisect.bisect_right(range(count), start_step, key=step)
        self._header = self._write_header(dtype, kept)
        self._file.truncate(start + kept * dtype.itemsize)

    def _write_header(self, dtype: np.dtype, count: int) -> _Header:
        descr = np.lib.format.dtype_to_descr(dtype)
        fields = {"descr": descr, "fortran_order": False, "shape": (count,)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, fields)
        start = self._file.tell()
        self._file.flush()
        return _Header(dtype, start, count)


def read_records(path: pathlib.Path) -> np.ndarray | None:
    """Returns a file's records, which stay on the disk until they are looked at.

    Returns:
      A structured array [N]; None if there is no file, or none that can be read.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(file)
    except (FileNotFoundError, ValueError):
        return None
    if not header.count:
        return None
    return np.memmap(path, header.dtype, "r", header.start, (header.count,))


def _dtype(num_layers: int, num_experts: int) -> np.dtype:
    values = "<f4", (num_layers, num_experts)
    return np.dtype([("step", "<i8"), ("load_LE", *values), ("bias_LE", *values)])


def _read_header(file: BinaryIO) -> _Header:
    """Raises ValueError for what isn't such a file; counts no record that is cut."""
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except (SyntaxError, tokenize.TokenError) as error:  # which NumPy lets through
        raise ValueError(f"its header can't be parsed: {error}") from error
    fields = dtype.fields or {}
    load = fields["load_LE"][0] if "load_LE" in fields else np.dtype("f4")
    if len(shape) != 1 or load.ndim != 2 or dtype != _dtype(*load.shape):
        raise ValueError(f"it holds an array {shape} of {dtype}")
    size = os.fstat(file.fileno()).st_size - file.tell()
    return _Header(dtype, file.tell(), max(0, min(*shape, size // dtype.itemsize)))
