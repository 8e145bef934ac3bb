"""Files and directories that a power cut leaves old or new, never half.

Until it is asked by `fsync`, a file system writes what it was given in any order: a
name may reach the disk before the bytes it stands for, and a name that was removed be
gone before its successor is there. What a name stands for is of its directory, which
has to be synced too (Pillai et al., "All File Systems Are Not Created Equal", OSDI
2014). So here, in this order: the content, its name, its directory; and whoever calls
removes what is older only then.

A disk that is full says so to whoever writes to a file (`write`, `close`, `fsync`), and
the error then names the file. It ends who writes to a map of one by SIGBUS, and NumPy's
`tofile` and `save` can miss it, so that nothing is written by these.
"""

import concurrent.futures
import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator


def unfinished(path: pathlib.Path) -> pathlib.Path:
    """Returns the name beside `path` under which its next content is written."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Adds `path` to what an OSError says that names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the name to write a file under that takes the place of `path`.

    When the context ends it is on the disk. An error inside leaves `path` as it was.
    """
    new = unfinished(path)
    try:
        with naming(path):
            yield new
        sync(new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file; returns when it is on the disk."""
    with replacing(path) as new:
        new.write_bytes(content)


def make_directory(path: pathlib.Path) -> None:
    """Makes a directory and those above it that are missing."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def publish(made: pathlib.Path, path: pathlib.Path) -> None:
    """Gives the directory `made` the name `path`, once all of it is on the disk.

    Raises:
      OSError: the name is taken, or the disk failed.
    """
    sync_tree(made)
    made.rename(path)
    sync(path.parent)


def sync_tree(directory: pathlib.Path) -> None:
    """Returns when all files and directories below, and itself, are on the disk."""
    below = list(directory.rglob("*"))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(sync, (path for path in below if path.is_file())))
    for path in reversed([directory, *(path for path in below if path.is_dir())]):
        sync(path)


def sync(path: pathlib.Path) -> None:
    """Returns when a file's content, or a directory's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(fd)
    except OSError as error:
        # File systems that can't sync a directory, some networks' among them, say so.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(fd)
