"""Makes a checkpoint of arrays that are on the disk already.

`Store.save` writes arrays that are on devices. Who converts a model larger than memory
writes its arrays himself, chunk by chunk, each a directory in zarr's plain format: a
`.zarray`, and a file of raw numbers for each chunk. `adopt` moves these directories
into a checkpoint, which Orbax describes and `Store` restores like any other.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jmoe.checkpoint import manifest, paths
from jmoe.data import durable

DESCRIPTION = ".zarray"


@dataclasses.dataclass(frozen=True)
class Array:
    """A directory that is an array, and size and CRC-32 of its chunks' files."""

    directory: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    files: Mapping[str, tuple[int, int]]


def description(
    shape: Sequence[int], chunk_shape: Sequence[int], dtype: np.dtype
) -> str:
    """Returns the text of `.zarray`.

    A chunk's file is named by its place: "0.3.0".
    """
    zarr = {
        "chunks": list(chunk_shape),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": dtype.str if dtype.isbuiltin == 1 else str(dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    return json.dumps(zarr)


def adopt(
    directory: pathlib.Path,
    step: int,
    arrays: Mapping[str, Array],
    position: Mapping[str, Any],
) -> None:
    """Moves `arrays` into the checkpoint `directory / str(step)`, whole or not there.

    Args:
      arrays: by the names that their leaves have in the state, as "params/head".
      position: of the data loader.
    """
    handler = _AdoptingHandler(
        use_ocdbt=False,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (Array, _ArrayHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
        ),
    )
    handler.manifest = {
        "step": step,
        "position": dict(position),
        "arrays": manifest.describe(arrays),
    }
    handler.known = {
        f"{name}/{file}": sums
        for name, array in arrays.items()
        for file, sums in array.files.items()
    }
    path = pathlib.Path(directory).absolute() / str(step)
    durable.make_directory(path.parent)
    with ocp.Checkpointer(handler, temporary_path_class=paths.Renamed) as writer:
        writer.save(paths.Literal(path), args=_Adopt(dict(arrays)))


class _ArrayHandler(ocp.type_handlers.NumpyHandler):
    """Moves a directory to where Orbax would write the array."""

    async def serialize(self, values: Sequence[Any], infos, args=None):
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            assert info.parent_dir is not None and info.name is not None
            target = pathlib.Path(info.parent_dir) / info.name
            target.parent.mkdir(parents=True, exist_ok=True)
            value.directory.rename(target)
        return []


class _AdoptingHandler(ocp.PyTreeCheckpointHandler):
    """Writes a manifest beside the arrays just before Orbax renames the directory.

    That is all there is to finish: Orbax would look for data files to merge.
    """

    manifest: dict[str, Any]
    known: dict[str, tuple[int, int]]

    def finalize(self, directory) -> None:
        manifest.write(pathlib.Path(directory), self.manifest, self.known)


# Orbax looks a handler up by the class of its arguments, and wants both.
@ocp.args.register_with_handler(_AdoptingHandler, for_save=True)
class _Adopt(ocp.args.PyTreeSave):
    pass


@ocp.args.register_with_handler(_AdoptingHandler, for_restore=True)
class _Restore(ocp.args.PyTreeRestore):
    pass
