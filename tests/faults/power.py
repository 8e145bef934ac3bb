"""What a power cut leaves of a directory, at every moment while a program writes to it.

`Disk(root)` is a context manager in which it sees what this process asks of the file
system, and notes what is on the disk for sure: a file's content as of its last `fsync`,
a directory's list of names as of its own. Whatever came later is there, or not, or in
part, and each file and directory is free to choose. A file that was only appended to
keeps what was synced; one that was written anew may not. The two ends are among the
images: nothing later is there, and all names are but no content. What a power cut may
not do is to lose what was there for sure.

    with power.Disk(tmp_path) as disk:
        write(tmp_path)
        disk.promise("new")
    for image in disk.images:
        image.restore(tmp_path / "image")
        assert read(tmp_path / "image") in ("old", "new")[image.promised == "new" :]

Files are seen by their inodes, which stay open here, so that no number is used twice.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

# What a cut leaves of a change that wasn't synced yet: whether a directory has its
# newer names, and how much a file has of its newer content.
CHOICES: dict[str, Callable[[random.Random], tuple[bool, float]]] = {
    "only what was synced": lambda _: (False, 0.0),
    "names without content": lambda _: (True, 0.0),
    "anything": lambda chance: (chance.random() < 0.5, chance.choice([0, 0.5, 1])),
}

_SEEN = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


@dataclasses.dataclass(frozen=True)
class Image:
    """A disk after a power cut. content: bytes of a file, None for a directory."""

    content: tuple[tuple[str, bytes | None], ...]
    promised: Any  # what was promised last before the cut

    def restore(self, directory: pathlib.Path) -> None:
        """Makes the new `directory` what the cut left of the one watched."""
        directory.mkdir()
        for name, data in self.content:
            path = directory / name
            path.mkdir() if data is None else path.write_bytes(data)


class Disk:
    """Watches `root`, which is on the disk with all that it holds.

    Args:
      every: how many calls there are from one cut to the next.

    Attributes:
      images: the different ones that a cut can leave, by when.
      calls: names and paths below root, in the order of their ends: ("fsync", "a"),
        ("rename", "a", "b").
    """

    def __init__(self, root: pathlib.Path, every: int = 1):
        self.images: dict[Image, None] = {}
        self.calls: list[tuple[str, ...]] = []
        self.root = root.resolve()
        self._every = every
        self._contents: dict[bytes, bytes] = {}  # so that each is in memory once
        self._synced: dict[int, bytes | dict[str, int]] = {}  # by inode
        self._kept: dict[int, int] = {}  # inode -> a descriptor
        self._promised: Any = None
        self._lock = threading.RLock()
        self._chance = random.Random(0)

    def __enter__(self) -> "Disk":
        for path in [self.root, *self.root.rglob("*")]:
            self._note(path)
        self._before = {name: getattr(os, name) for name in _SEEN}
        for name, function in self._before.items():
            setattr(os, name, self._watched(name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._before.items():
            setattr(os, name, function)
        for fd in self._kept.values():
            os.close(fd)

    def promise(self, what: Any) -> None:
        """From now on, `what` must outlive a cut."""
        with self._lock:
            self._promised = what
            self._cut()

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            paths = [_path(args[0], options)]
            paths += [_path(args[1], {})] if name in ("rename", "replace") else []
            if not paths[0].is_relative_to(self.root):
                return function(*args, **options)
            with self._lock:
                result = function(*args, **options)
                if name == "fsync":
                    self._note(paths[0])
                below = (os.path.relpath(path, self.root) for path in paths)
                self.calls.append((name, *below))
                if len(self.calls) % self._every == 0:
                    self._cut()
            return result

        return call

    def _note(self, path: pathlib.Path) -> None:
        """This file or directory is on the disk as it is."""
        inode = self._keep(path)
        if path.is_dir():
            self._synced[inode] = self._names(path)
        else:
            self._synced[inode] = path.read_bytes()

    def _names(self, directory: pathlib.Path) -> dict[str, int]:
        names = {}
        for path in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # gone since; so let it be
                names[path.name] = self._keep(path)
        return names

    def _keep(self, path: pathlib.Path) -> int:
        fd = os.open(path, os.O_RDONLY)
        inode = os.fstat(fd).st_ino
        if inode in self._kept:
            os.close(fd)
        else:
            self._kept[inode] = fd
        return inode

    def _cut(self) -> None:
        """Adds what is left if the power goes now."""
        for choose in CHOICES.values():
            root = os.stat(self.root).st_ino
            content = tuple(self._left(root, "", choose))
            self.images[Image(content, self._promised)] = None

    def _left(
        self, inode: int, name: str, choose: Callable[..., tuple[bool, float]]
    ) -> Iterator[tuple[str, bytes | None]]:
        newer_names, share = choose(self._chance)
        path = pathlib.Path(f"/proc/self/fd/{self._kept[inode]}")
        synced = self._synced.get(inode)
        if not path.is_dir():
            data = path.read_bytes()
            assert not isinstance(synced, dict)
            if data != synced and (synced is None or share):
                has_grown = synced is not None and data.startswith(synced)
                sure = len(synced or b"") if has_grown else 0
                synced = data[: sure + int(share * (len(data) - sure))]
            assert synced is not None
            yield name, self._contents.setdefault(synced, synced)
            return
        if name:
            yield name, None
        names = self._names(path) if newer_names else (synced or {})
        assert isinstance(names, dict)
        for below, child in sorted(names.items()):
            yield from self._left(child, f"{name}/{below}".lstrip("/"), choose)


def _path(target: Any, options: dict[str, Any]) -> pathlib.Path:
    """What a call is about, by its path or its descriptor."""
    if isinstance(target, int):
        return pathlib.Path(os.readlink(f"/proc/self/fd/{target}"))
    above = options.get("dir_fd")
    base = os.getcwd() if above is None else os.readlink(f"/proc/self/fd/{above}")
    return pathlib.Path(base, os.fspath(target))
