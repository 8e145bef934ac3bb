"""Orbax's handler of arrays, with a manifest of what it wrote.

Each process sums the files that it has written itself. Once all have, process 0 merges
Orbax's indices and writes the manifest, just before Orbax renames the directory.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from jmoe.checkpoint import manifest, paths, sums

_CHUNK_BYTES = 32 << 20


class Handler(ocp.PyTreeCheckpointHandler):
    """Writes and reads `Save` and `Restore`.

    Attributes:
      manifest: of the checkpoint that is being written, but for its files.
    """

    manifest: dict[str, Any]

    async def async_save(
        self, directory, *args, **kwargs
    ) -> list[future.ChainedFuture]:
        written = await super().async_save(directory, *args, **kwargs)
        own = pathlib.Path(directory) / paths.of_process(jax.process_index())
        return [future.ChainedFuture(written or [], lambda: sums.leave(own))]

    def finalize(self, directory) -> None:
        super().finalize(directory)
        path = pathlib.Path(directory)
        if not (path / paths.MERGED).is_file():
            raise RuntimeError(
                f"Orbax did not merge what the processes wrote to {path}, so that it "
                "can't be read; it was not made a checkpoint."
            )
        manifest.write(path, self.manifest, sums.collect(path))


# Orbax looks a handler up by the class of its arguments.
@ocp.args.register_with_handler(Handler, for_save=True)
class Save(ocp.args.PyTreeSave):
    pass


@ocp.args.register_with_handler(Handler, for_restore=True)
class Restore(ocp.args.PyTreeRestore):
    pass


def to_save(arrays: Mapping[str, jax.Array]) -> Save:
    """Returns what has Orbax write these arrays, large ones in chunks."""
    return Save(arrays, {name: _chunked(array) for name, array in arrays.items()})


def to_restore(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> Restore:
    """Returns what has Orbax read these arrays, each to where its sharding says.

    By default to this process's first device. Others may be stored, and none of these
    must be missing.
    """
    targets = {name: _placed(array) for name, array in arrays.items()}
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    return Restore(targets, restore_args=restore_args, partial_restore=True)


def _placed(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if array.sharding is not None:
        return array
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=default)


def _chunked(array: jax.Array) -> ocp.SaveArgs:
    """Stores a large array so that a layer, and an expert of it, can be read alone.

    Orbax would make a chunk of each device's part. By itself it cuts the longest
    dimension first, and so through all layers and experts.
    """
    if array.nbytes <= _CHUNK_BYTES:
        return ocp.SaveArgs()
    sizes = [array.nbytes]
    for length in array.shape[:-2]:  # a matrix is left to Orbax
        if sizes[-1] <= _CHUNK_BYTES:
            break
        sizes.append(sizes[-1] // length)
    axes = tuple(range(len(sizes) - 1))
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)
