"""Reads a Hugging Face directory as our variables, any part of any leaf at a time.

Everything is checked before the first weight is read: architecture, files, index, and
every tensor's name, shape and type, with one report of all that is wrong. Then a part
of a leaf costs the bytes of that part: rows of a matrix are read at once, where a part
has only some of the columns the file is mapped.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jmoe import families
from jmoe.checkpoint.unread import Slices
from jmoe.export import names, numerics, safetensors, sources
from jmoe.export.files import Buffers, Files
from jmoe.export.layout import SCALE
from jmoe.export.names import Tensor
from jmoe.export.numerics import BFLOAT16, FLOAT8, FLOAT32
from jmoe.export.safetensors import Found

FP8_MODES = ("dequantize", "keep")
DTYPES = ("float32", "bfloat16")

# Made anew from the configuration, whatever older versions of transformers saved.
IGNORED = ".rotary_emb.inv_freq"

_COMPARED = 16 << 20  # bytes at a time

Places = list[tuple[int | None, int | None]]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays, and the tensors that it is made of by layer and expert.

    Without tensors it is zero, and is read in one piece.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: Mapping[tuple[int | None, int | None], Sequence[Tensor]]

    @property
    def is_absent(self) -> bool:
        return not self.tensors

    @property
    def is_stacked(self) -> bool:
        return not self.is_absent and next(iter(self.tensors))[0] is not None

    @property
    def has_experts(self) -> bool:
        return not self.is_absent and next(iter(self.tensors))[1] is not None

    @property
    def num_lead(self) -> int:
        """How many dimensions, of layers and of experts, come first."""
        return self.is_stacked + self.has_experts


class Reader:
    """A checked directory; `leaves` by path, `fill` copies parts of them.

    Args:
      fp8: "dequantize" turns FP8 weights into `dtype`; "keep" gives e4m3 leaves, and
        their block scales as the collection `fp8_scales`.
      dtype: of the leaves; None: each as its file has it, float16 as float32, and FP8
        as the config's `torch_dtype`. Selection biases are float32 always.

    Raises:
      FileNotFoundError, ValueError: the directory isn't a whole checkpoint of a
        model of a known family.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        fp8: str = "dequantize",
        dtype: str | None = None,
    ):
        _one_of("fp8", fp8, FP8_MODES)
        if dtype is not None:
            _one_of("dtype", dtype, DTYPES)
        self.directory = pathlib.Path(directory)
        self.cfg = families.from_hf(safetensors.read_config(self.directory))
        headers = safetensors.read_headers(self.directory)
        self.found = {
            name: found
            for name, found in safetensors.split_experts(headers).items()
            if not name.endswith(IGNORED)
        }
        tensors = names.expand(self.cfg) + names.redundant(self.cfg)
        check(tensors, self.found, self.directory)
        self._keeps = fp8 == "keep"
        if self._keeps and not any(x.code == "F8_E4M3" for x in self.found.values()):
            raise ValueError(f"fp8='keep', but {self.directory} has no FP8 weights.")
        self.copies = [t for t in tensors if t.is_copy and t.name in self.found]
        owned = [t for t in tensors if not t.is_copy]
        self._owners = {tensor.path: tensor.name for tensor in owned}
        self.leaves = self._leaves(owned, dtype)
        self._files = Files()
        self._buffers = Buffers()

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fill(self, out: np.ndarray, path: str, index: Slices) -> None:
        """Sets `out[:] = leaf[index]`; may be called from several threads.

        Args:
          index: a slice for each of the leaf's dimensions, with start and stop.

        Raises:
          ValueError: what was read isn't finite; names file and tensor.
        """
        leaf = self.leaves[path]
        if leaf.is_absent:
            out.fill(0)
            return
        layers, experts, inner = _lead(leaf, index)
        for (at, layer), (to, expert) in itertools.product(layers, experts):
            place = tuple(i for i in (at, to) if i is not None)
            for tensor in leaf.tensors[layer, expert]:
                self._fill_piece(out[place], tensor, inner, leaf.shape[-1])

    def read(self, path: str, index: Slices) -> np.ndarray:
        """Returns `leaf[index]` as a new array."""
        shape = [part.stop - part.start for part in index]
        out = np.empty(shape, self.leaves[path].dtype)
        self.fill(out, path, index)
        return out

    def check_copies(self) -> None:
        """Raises ValueError if what repeats a tensor differs from it."""
        for copy in self.copies:
            original = self._owners[copy.path]
            if self._differ(self.found[copy.name], self.found[original]):
                raise ValueError(
                    f"{copy.name} differs from {original}; in jmoe's models MTP "
                    "modules share the embedding and the head, and tied ones are one."
                )

    def raw(self, found: Found) -> np.ndarray:
        """Returns a tensor as it is in its file, mapped into memory."""
        assert found.dtype is not None
        data = self._files.mapped(found.file)
        data = data[found.offset : found.offset + found.nbytes]
        return data.view(found.dtype).reshape(found.shape)

    def _differ(self, one: Found, other: Found) -> bool:
        if one[2:] != other[2:]:
            return True
        buffers = Buffers(), Buffers()
        for start in range(0, one.nbytes, _COMPARED):
            length = min(_COMPARED, one.nbytes - start)
            first, second = (
                self._files.read(found.file, found.offset + start, length, buffer)
                for found, buffer in zip((one, other), buffers, strict=True)
            )
            if not np.array_equal(first, second):
                return True
        return False

    def _fill_piece(
        self, out: np.ndarray, tensor: Tensor, inner: Slices, per_head: int
    ) -> None:
        """Fills the part `inner` of one tensor's piece."""
        if tensor.half is not None:
            halves = inner[1]
            if not halves.start <= tensor.half < halves.stop:
                return
            out = out[:, tensor.half - halves.start]
            inner = (inner[0], *inner[2:])
        found = self.found[tensor.name]
        if not tensor.transposed:
            if len(inner) > len(tensor.shape):  # a vector, which ours has by heads
                x = self._part(tensor.name, slice(0, tensor.size))
                numerics.copy(out, x.reshape(-1, per_head)[inner])
            else:
                numerics.copy(out, self._part(tensor.name, *inner))
            return
        columns, rows, *within = inner
        if within:  # the file has heads, and what each head has, in one dimension
            rows = slice(rows.start * per_head, rows.stop * per_head)
        x = self._part(tensor.name, rows, columns)
        if within and within[0] != slice(0, per_head):
            assert found.dtype != FLOAT8, "a head's FP8 weights are read as a whole"
            x = x.reshape(-1, per_head, x.shape[-1])[:, within[0]]
            x = x.reshape(-1, x.shape[-1])
        out = out.reshape(len(out), -1)
        if found.dtype != FLOAT8 or out.dtype == FLOAT8:
            numerics.transpose(out, x)
            return
        name = tensor.name + SCALE
        scale = self._finite(name, self.raw(self.found[name]))
        scale = numerics.cast(scale, FLOAT32)
        origin = (rows.start, columns.start)
        numerics.dequantize_transposed(out, x, scale, origin)

    def _part(self, name: str, rows: slice, columns: slice | None = None) -> np.ndarray:
        """Returns some rows and columns of a tensor, which must be finite."""
        found = self.found[name]
        assert found.dtype is not None
        if columns is not None and columns != slice(0, found.shape[1]):
            return self._finite(name, self.raw(found)[rows, columns])
        width = found.nbytes // found.shape[0]
        offset, length = rows.start * width, (rows.stop - rows.start) * width
        data = self._files.read(
            found.file, found.offset + offset, length, self._buffers
        )
        x = np.frombuffer(data, found.dtype).reshape(-1, *found.shape[1:])
        return self._finite(name, x)

    def _finite(self, name: str, x: np.ndarray) -> np.ndarray:
        if not numerics.is_finite(x):
            file = self.found[name].file
            raise ValueError(f"{file}: NaN or infinite numbers in {name}.")
        return x

    def _leaves(self, tensors: Sequence[Tensor], dtype: str | None) -> dict[str, Leaf]:
        shapes = {path: x.shape for path, x in names.abstract_leaves(self.cfg).items()}
        grouped: dict[str, dict[Any, list[Tensor]]] = {}
        for tensor in tensors:
            by_place = grouped.setdefault(tensor.path, {})
            by_place.setdefault((tensor.layer, tensor.expert), []).append(tensor)
        leaves = {
            path: Leaf(shapes[path], FLOAT32, {}) for path in names.absent(self.cfg)
        }
        for path, by_place in grouped.items():
            own = [tensor for row in by_place.values() for tensor in row]
            chosen = self._dtype(own, dtype)
            leaves[path] = Leaf(shapes[path], chosen, by_place)
            if chosen == FLOAT8:
                leaves[sources.scales_path(path)] = _scale_leaf(leaves[path])
        return leaves

    def _dtype(self, tensors: Sequence[Tensor], dtype: str | None) -> np.dtype:
        """Returns the dtype of a leaf made of these: the widest, unless told."""
        stored = {self.found[tensor.name].dtype for tensor in tensors}
        if tensors[0].is_float32:
            return FLOAT32
        if self._keeps and stored == {FLOAT8}:
            return FLOAT8
        wanted = dtype or (self.cfg.dtype if stored == {FLOAT8} else None)
        if wanted is not None:
            return FLOAT32 if wanted == "float32" else BFLOAT16
        return BFLOAT16 if stored <= {BFLOAT16, FLOAT8} else FLOAT32


def check(
    tensors: Sequence[Tensor], found: Mapping[str, Found], where: pathlib.Path
) -> None:
    """Raises one ValueError with every missing, unexpected and misshapen tensor."""
    expected = {tensor.name: tensor.shape for tensor in tensors}
    optional = {tensor.name for tensor in tensors if tensor.is_copy}
    for tensor in tensors:
        is_fp8 = tensor.name in found and found[tensor.name].code == "F8_E4M3"
        if is_fp8 and tensor.is_product:
            shape = tuple(map(numerics.blocks, tensor.shape))
            expected[tensor.name + SCALE] = shape
    products = {tensor.name for tensor in tensors if tensor.is_product}
    problems = [
        f"  missing: {name} {list(shape)}"
        for name, shape in expected.items()
        if name not in found and name not in optional
    ]
    problems += [
        f"  unexpected: {name} {list(x.shape)}"
        for name, x in found.items()
        if name not in expected
    ]
    for name, x in found.items():
        if name not in expected:
            continue
        if x.shape != expected[name]:
            problems.append(
                f"  misshapen: {name} {list(x.shape)}, not {list(expected[name])}"
            )
        allowed = ("F32", "BF16", "F16")
        allowed += ("F8_E4M3",) if name in products else ()
        if x.code not in allowed:
            problems.append(
                f"  unreadable: {name} {x.code}, not {' or '.join(allowed)}"
            )
    mtp = [t.name for t in tensors if "/mtp_" in t.path]
    if mtp and not any(name in found for name in mtp):
        problems.append(
            "All MTP layers that the config promises are missing: if they were dropped "
            "on purpose, set num_nextn_predict_layers to 0 in it."
        )
    if problems:
        title = f"{where} is not the checkpoint that its config.json describes:"
        raise ValueError("\n".join([title, *problems]))


def _scale_leaf(leaf: Leaf) -> Leaf:
    """Returns the block scales of a leaf that stays FP8, as a leaf of their own."""
    tensors = {
        place: [
            dataclasses.replace(
                tensor,
                name=tensor.name + SCALE,
                shape=tuple(map(numerics.blocks, tensor.shape)),
            )
            for tensor in own
        ]
        for place, own in leaf.tensors.items()
    }
    first = next(iter(tensors.values()))
    lead = leaf.shape[: leaf.num_lead]
    pair = (2,) if first[0].half is not None else ()
    out_blocks, in_blocks = first[0].shape
    return Leaf((*lead, in_blocks, *pair, out_blocks), FLOAT32, tensors)


def _lead(leaf: Leaf, index: Slices) -> tuple[Places, Places, Slices]:
    """Returns (place in the part, number) of layers and experts; the other slices."""
    rest = list(index)
    found: list[Places] = []
    for exists in (leaf.is_stacked, leaf.has_experts):
        if not exists:
            found.append([(None, None)])
            continue
        part = rest.pop(0)
        found.append([(n - part.start, n) for n in range(part.start, part.stop)])
    return found[0], found[1], tuple(rest)


def _one_of(field: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise ValueError(f"{field}={value!r} is not one of {listed}.")
