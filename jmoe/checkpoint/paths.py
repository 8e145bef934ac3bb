"""How Orbax finds a checkpoint's directory, and gives it its name.

Orbax writes under a temporary name and renames. It looks for some of its own files by
patterns that have the directory's name in them, so that in `runs/a[1]` it found none:
neither what is to be merged, without which no array can be read, nor what says which
arrays are random keys.
"""

import pathlib
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

from jmoe.data import durable

MERGED = "manifest.ocdbt"  # Orbax's file where arrays share data files


def of_process(index: int) -> str:
    """Returns the name of the directory in which Orbax keeps what a process wrote."""
    return f"ocdbt.process_{index}"


class Literal(type(epath.Path())):
    """A path whose own characters `[`, `]`, `*` and `?` stand for themselves."""

    def glob(self, pattern: str) -> Iterator["Literal"]:
        found = pathlib.Path(self).glob(pattern)
        return (Literal(str(path)) for path in found)


class Renamed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Renames a directory, and returns when its name is on the disk."""

    async def finalize(self) -> None:
        await super().finalize()
        directory = pathlib.Path(self.get_final())
        durable.sync_tree(directory)  # Orbax wrote to it once more, after the manifest
        durable.sync(directory.parent)
