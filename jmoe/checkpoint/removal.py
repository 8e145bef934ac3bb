"""Takes away what no longer counts as a checkpoint.

A directory loses its name at once, and its files in the background: what is half
deleted must not be found under the name of a step.
"""

import concurrent.futures
import pathlib
import shutil

import orbax.checkpoint as ocp
from absl import logging

from jmoe.data import durable

_UNFINISHED = ocp.path.atomicity_types.TMP_DIR_SUFFIX


class Remover:
    """A background thread that deletes, until it is closed."""

    def __init__(self):
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def remove(self, path: pathlib.Path) -> None:
        """Takes `path` away from its name, and then off the disk."""
        step = path.name.partition(".")[0]
        self._thread.submit(_delete, rename(path, f"{step}.removed"))

    def remove_left(self, directory: pathlib.Path) -> None:
        """Removes what interrupted saves and removals left in `directory`."""
        for path in directory.glob(f"[0-9]*{_UNFINISHED}"):
            logging.warning("Removing %s, left by an interrupted save.", path)
            self.remove(path)
        for path in directory.glob("[0-9]*.removed*"):
            self._thread.submit(shutil.rmtree, path, ignore_errors=True)

    def close(self) -> None:
        """Returns when all that was taken away is off the disk."""
        self._thread.shutdown()


def rename(path: pathlib.Path, name: str) -> pathlib.Path:
    """Renames `path` beside itself to `name`, numbered if that is taken."""
    target, count = path.with_name(name), 1
    while target.exists():
        target, count = path.with_name(f"{name}-{count}"), count + 1
    return path.rename(target)


def _delete(removed: pathlib.Path) -> None:
    """Deletes it once its name is on the disk, so that no half has the one before."""
    durable.sync(removed.parent)
    shutil.rmtree(removed, ignore_errors=True)
