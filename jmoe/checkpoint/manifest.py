"""What a checkpoint holds, and whether it is still what was written.

Orbax notices when its index is broken, but array data carries no checksum: a byte that
changes on disk would be read as it is. So each checkpoint has a `manifest.json`,
written last:

    step      the optimizer step
    position  where the data loader stood
    arrays    name -> "float32[64,8]", for each array of the state
    files     path -> [bytes, CRC-32], for each file below the checkpoint's directory
    validation_loss   at this step; absent where it wasn't evaluated, or isn't finite
    crc       CRC-32 of all this, which checkpoints of jmoe 0.1 lack

A checkpoint is whole if its manifest is as it was written, for a directory of this
name, and all of its files have their full size; restoring also compares their sums.
"""

import json
import pathlib
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax

from jmoe.checkpoint import sums
from jmoe.data import durable

FILE_NAME = "manifest.json"
_REWRITTEN = "_CHECKPOINT_METADATA"  # Orbax touches it once more after we are done
_FIELDS = {"step": int, "position": dict, "arrays": dict, "files": dict}
_KINDS = {**_FIELDS, "validation_loss": float}
_FLOATS = {"float16", "bfloat16", "float32"}
_LISTED_DIFFERENCES = 8


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint are missing, cut short or altered."""

    def __init__(self, directory: pathlib.Path, reason: str):
        super().__init__(f"Checkpoint {directory} is damaged: {reason}.")


def flatten(tree: Any) -> dict[str, Any]:
    """Returns a pytree's leaves by name, in its order: {"params/embed/kernel": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
    assert len(flat) == len(leaves), "two leaves share a name"
    return flat


def describe(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns dtype and shape of each array or `jax.ShapeDtypeStruct`, as text.

    Say, "float32[64,8]".
    """
    return {
        name: f"{array.dtype}[{','.join(map(str, array.shape))}]"
        for name, array in arrays.items()
    }


def parse(described: str) -> tuple[str, tuple[int, ...]]:
    """Returns dtype and shape of what `describe` says of an array."""
    dtype, _, dims = described.rstrip("]").partition("[")
    return dtype, tuple(int(size) for size in dims.split(",") if size)


def write(
    directory: pathlib.Path,
    manifest: Mapping[str, Any],
    known: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Writes `manifest`, with the files of `directory` added to it, beside them.

    Returns when all are on the disk, so that the directory may take its name.

    Args:
      known: sizes and sums of files that needn't be read for them.
    """
    files = dict(known or {})
    unread = (name for name in sums.names(directory) if name not in files)
    files |= sums.of_files(directory, unread)
    files.pop(_REWRITTEN, None)
    whole = json.loads(json.dumps({**manifest, "files": files}))  # as it is read
    durable.sync_tree(directory)
    text = json.dumps({**whole, "crc": _own_crc(whole)}, indent=1)
    durable.write_text(directory / FILE_NAME, text)


def read(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint whose files have their full size.

    Raises:
      DamagedCheckpointError: the manifest was altered or is another step's, or a file
        is missing or has another size; names both.
    """
    manifest = _read_own(directory)
    for name, (written, _) in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise DamagedCheckpointError(directory, f"{name} is missing")
        found = path.stat().st_size
        if found != written:
            raise DamagedCheckpointError(
                directory, f"{name} has {found} bytes, not {written}"
            )
    return manifest


def _read_own(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the manifest as it was written; only its files remain to be looked at."""
    try:
        manifest = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpointError(directory, f"{FILE_NAME} is missing") from None
    except ValueError as error:
        raise DamagedCheckpointError(directory, f"{FILE_NAME}: {error}") from None
    crc = manifest.pop("crc", None) if isinstance(manifest, dict) else None
    if not _is_well_formed(manifest) or crc not in (None, _own_crc(manifest)):
        raise DamagedCheckpointError(directory, f"{FILE_NAME} was altered")
    if str(manifest["step"]) != directory.name:
        step = manifest["step"]
        raise DamagedCheckpointError(directory, f"{FILE_NAME} is that of step {step}")
    return manifest


def _is_well_formed(manifest: Any) -> bool:
    """Returns whether a manifest is well-formed.

    Of older manifests, which have no sum of their own, no more can be said.
    """
    if not isinstance(manifest, dict):
        return False
    if not _FIELDS.keys() <= manifest.keys() <= _KINDS.keys():
        return False
    if not all(isinstance(manifest[name], _KINDS[name]) for name in manifest):
        return False
    described, pairs = manifest["arrays"].values(), manifest["files"].values()
    return all(isinstance(text, str) for text in described) and all(
        isinstance(pair, list) and [*map(type, pair)] == [int, int] for pair in pairs
    )


def _own_crc(manifest: Mapping[str, Any]) -> int:
    """Returns CRC-32 of what a manifest says, however it is laid out as text."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def check_sums(directory: pathlib.Path, files: Mapping[str, Sequence[int]]) -> None:
    """Reads every file; raises DamagedCheckpointError for one that was altered."""
    sizes = {name: size for name, (size, _) in files.items()}
    compare(directory, files, sums.read(directory, sizes))


def compare(
    directory: pathlib.Path,
    files: Mapping[str, Sequence[int]],
    parts: Iterable[sums.Checksum],
) -> None:
    """Raises DamagedCheckpointError for a file of which other bytes were read.

    Args:
      parts: of all files, as `sums.read` gives them.
    """
    found = sums.join(parts)
    for name, written in files.items():
        size, crc = found.get(name, (0, 0))
        if crc is None:
            raise DamagedCheckpointError(directory, f"{name} is missing")
        if [size, crc] != [*written]:
            raise DamagedCheckpointError(directory, f"{name} was altered (CRC-32)")


def check_arrays(
    directory: pathlib.Path,
    expected: Mapping[str, str],
    stored: Mapping[str, str],
    ignore: Collection[str],
) -> None:
    """Raises one ValueError with the first differences in name, shape or dtype.

    Args:
      directory: of the checkpoint, for the message.
      expected: what the caller wants to read, as `describe` gives it.
      stored: what there is, likewise.
      ignore: first components of names that may be stored and not expected.
    """
    found = {
        name: text for name, text in stored.items() if name.split("/")[0] not in ignore
    }
    differences = [
        f"  {name}: expected {expected.get(name, 'nothing')}, "
        f"found {found.get(name, 'nothing')}"
        for name in {**expected, **found}
        if not _readable_as(expected.get(name, ""), found.get(name, ""))
    ]
    if not differences:
        return
    lines = differences[:_LISTED_DIFFERENCES]
    if len(differences) > len(lines):
        lines.append(f"  and {len(differences) - len(lines)} more")
    raise ValueError(
        "\n".join([f"Checkpoint {directory} holds another state:", *lines])
    )


def _readable_as(expected: str, found: str) -> bool:
    """Returns whether shapes are the same, and dtypes are, or are both floating."""
    dtype, _, shape = expected.partition("[")
    stored_dtype, _, stored_shape = found.partition("[")
    return shape == stored_shape and (
        dtype == stored_dtype or {dtype, stored_dtype} <= _FLOATS
    )
