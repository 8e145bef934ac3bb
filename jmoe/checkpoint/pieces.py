"""Reads parts of a checkpoint's arrays, without reading the rest.

`Store.restore` brings whole arrays to devices; this is for what must not have a whole
model in memory. An array is stored in chunks (`jmoe.checkpoint.store` says how large),
and a part costs the chunks that it touches; those read last are kept for the next part.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore

from jmoe.checkpoint import manifest, paths

_KEPT_BYTES = 128 << 20  # of chunks


class Pieces:
    """The arrays of one checkpoint; `read` may be called from several threads.

    Args:
      directory: of the checkpoint, as `Store.locate` gives it.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = pathlib.Path(directory).absolute()
        self._manifest = manifest.read(self.directory)
        described = self._manifest["arrays"]
        parsed = {name: manifest.parse(text) for name, text in described.items()}
        self.shapes = {name: shape for name, (_, shape) in parsed.items()}
        self.dtypes = {name: np.dtype(dtype) for name, (dtype, _) in parsed.items()}
        self._opened: dict[str, Any] = {}
        kept = {"cache_pool": {"total_bytes_limit": _KEPT_BYTES}}
        self._context = tensorstore.Context(kept)

    @property
    def files(self) -> Mapping[str, list[int]]:
        """Size and CRC-32 of every file, by path: what tells checkpoints apart."""
        return self._manifest["files"]

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        """Returns `array[index]` of leading dimensions."""
        if name not in self._opened:
            opened = tensorstore.open(self._spec(name), context=self._context)
            self._opened[name] = opened.result()
        return self._opened[name][index].read().result()

    def check_sums(self) -> None:
        """Reads every file; raises DamagedCheckpointError for one that was altered."""
        manifest.check_sums(self.directory, self.files)

    def _spec(self, name: str) -> dict[str, Any]:
        store: dict[str, Any] = {"driver": "file", "path": f"{self.directory}/"}
        if (self.directory / paths.MERGED).exists():
            store = {"driver": "ocdbt", "base": store, "path": f"{name}/"}
        else:
            store["path"] += f"{name}/"
        return {
            "driver": "zarr",
            "kvstore": store,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,
        }
