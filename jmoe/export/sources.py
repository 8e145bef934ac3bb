"""Where exported weights come from: variables in memory, or a run's checkpoint on disk.

Both give numpy arrays, a unit at a time. `dtypes` names every leaf; a leaf that is FP8
has its block scales in the collection `fp8_scales`, under the same path, each matrix
[in / 128, out / 128] rounded up.
"""

import abc
import secrets
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (numpy then knows "bfloat16")
import numpy as np

from jmoe.checkpoint import manifest
from jmoe.checkpoint.pieces import Pieces
from jmoe.export.names import COLLECTIONS

SCALES = "fp8_scales"

Index = tuple[int | slice, ...]


class Source(abc.ABC):
    """Weights by path.

    name: for messages. shapes, dtypes: of every leaf. identity: changes with them.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    identity: str

    @abc.abstractmethod
    def read(self, path: str, index: Index) -> np.ndarray:
        """Returns a part of a leaf."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises ValueError if the weights aren't what was stored."""


class InMemory(Source):
    """Variables as `Transformer.init` makes them, on any devices of this process."""

    def __init__(self, variables: Any):
        self.name = "Variables"
        self._leaves = manifest.flatten(variables)
        self.shapes = {path: tuple(x.shape) for path, x in self._leaves.items()}
        self.dtypes = {path: np.dtype(x.dtype) for path, x in self._leaves.items()}
        self.identity = secrets.token_hex()

    def read(self, path: str, index: Index) -> np.ndarray:
        return np.asarray(self._leaves[path])[index]

    def check(self) -> None:
        """Does nothing, as there is nothing to compare with."""


class Stored(Source):
    """The parameters and biases of a checkpoint, read piece by piece."""

    def __init__(self, pieces: Pieces):
        wanted = (*COLLECTIONS, SCALES)
        names = [name for name in pieces.shapes if name.split("/")[0] in wanted]
        self._pieces = pieces
        self.name = str(pieces.directory)
        self.shapes = {name: pieces.shapes[name] for name in names}
        self.dtypes = {name: pieces.dtypes[name] for name in names}
        self.identity = repr(sorted(pieces.files.items()))

    def read(self, path: str, index: Index) -> np.ndarray:
        return self._pieces.read(path, index)

    def check(self) -> None:
        self._pieces.check_sums()


def scales_path(path: str) -> str:
    """Returns where the block scales of the FP8 leaf at `path` are."""
    return f"{SCALES}/{path.partition('/')[2]}"
