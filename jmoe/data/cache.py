"""Where prepared data is kept, and how it gets there in one piece.

What is being made lies under a name of its own, in a directory that its maker has
locked. The system gives a lock back with the process that holds it, so that what a dead
one has left is known by that, and removed.

    NAME             what is whole
    .making-XXXX     what will be, of one process; removed as soon as that is dead
    NAME.partial     finished parts of what takes long, for whoever goes on with it
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

from absl import logging

from jmoe.config import checks
from jmoe.config.data import DataConfig
from jmoe.data import durable

_MAKING = ".making-"
_PARTIAL = ".partial"
_UNUSED_S = 14 * 86_400  # after which parts are no longer waited for

Flaw = Callable[[pathlib.Path], str | None]


def directory(cfg: DataConfig) -> pathlib.Path:
    """Returns `cfg.cache_dir`, or the user's cache directory where that is empty.

    Raises:
      ValueError: it is no path of this machine, or the user has no home directory.
    """
    if cfg.cache_dir:
        return checks.local_path("data.cache_dir", cfg.cache_dir)
    if user_cache := os.environ.get("XDG_CACHE_HOME"):
        return checks.local_path("XDG_CACHE_HOME", user_cache) / "jmoe"
    try:
        return pathlib.Path.home() / ".cache" / "jmoe"
    except RuntimeError as error:
        raise ValueError(
            "This user has no home directory to keep prepared data in; name one by "
            "data.cache_dir or the variable XDG_CACHE_HOME."
        ) from error


def key(*parts: str | int | float | bytes) -> str:
    """Returns a file name that stands for exactly these parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:32]


def holds(path: pathlib.Path, flaw: Flaw) -> bool:
    """Returns whether `path` is there and whole.

    What is damaged is removed, with a warning.

    Args:
      flaw: what is wrong with a directory that was found, such as a file that was cut
        short since. None: nothing is.
    """
    if not path.exists():
        return False
    wrong = flaw(path)
    if wrong is None:
        return True
    logging.warning("%s is damaged (%s): making it again.", path, wrong)
    with _aside(path.parent) as aside, contextlib.suppress(FileNotFoundError):
        path.rename(aside / path.name)  # in one piece, whoever else does so too
    return False


def made_once(
    path: pathlib.Path, make: Callable[[pathlib.Path], None], flaw: Flaw
) -> pathlib.Path:
    """Returns the directory `path`, filled by `make(directory)` unless it is whole.

    It is made aside and renamed into place, so that no reader ever sees half of it,
    and of several processes making it at once the first wins.
    """
    if holds(path, flaw):
        return path
    durable.make_directory(path.parent)
    with _aside(path.parent) as aside:
        made = aside / path.name
        made.mkdir()
        make(made)
        try:
            durable.publish(made, path)
        except OSError:
            if not path.exists():
                raise
    return path


@contextlib.contextmanager
def partial(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a directory for finished parts of `path`, with those of earlier attempts.

    One process at a time is inside; the others wait. Parts stay after an error, but
    not beside a `path` that is whole.
    """
    parts = path.with_name(path.name + _PARTIAL)
    durable.make_directory(path.parent)
    with contextlib.ExitStack() as stack:
        is_held = False
        while not is_held:  # unless it was removed by whoever was waited for
            parts.mkdir(exist_ok=True)
            is_held = stack.enter_context(_locked(parts, f"{path}"))
        try:
            yield parts
        finally:
            if path.exists():
                shutil.rmtree(parts, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # there are parts in it
                    parts.rmdir()


@contextlib.contextmanager
def _aside(parent: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new directory of this process, removed in the end."""
    with contextlib.ExitStack() as stack:
        # Alone, so that none is found before it is locked.
        with _locked(parent):
            for path in list(parent.iterdir()):
                _remove_orphan(path)
            aside = pathlib.Path(tempfile.mkdtemp(dir=parent, prefix=_MAKING))
            stack.enter_context(_locked(aside))
        stack.callback(shutil.rmtree, aside, ignore_errors=True)
        yield aside


def _remove_orphan(path: pathlib.Path) -> None:
    """Removes what a dead process was making, or parts that nobody came back for."""
    is_old = path.name.endswith(_PARTIAL) and _age_s(path) > _UNUSED_S
    if not (path.name.startswith(_MAKING) or is_old):
        return
    with _locked(path, None) as is_dead:
        if is_dead and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif is_dead:
            path.unlink(missing_ok=True)


def _age_s(path: pathlib.Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextlib.contextmanager
def _locked(path: pathlib.Path, awaited: str | None = "") -> Iterator[bool]:
    """Holds the lock of a file or directory; yields whether it does.

    It doesn't where `path` is gone or has been replaced.

    Args:
      awaited: what another process makes that has the lock, to be told while waiting
        for it; "" is nothing worth telling. None: doesn't wait, and doesn't hold a
        lock that another has, or may have for all that the file system knows.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(fd, awaited) and _is_at(fd, path)
    finally:
        os.close(fd)


def _lock(fd: int, awaited: str | None) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if awaited is None:
            return False
        if awaited:
            logging.warning("Another process makes %s: waiting for it.", awaited)
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return awaited is not None
    return True


def _is_at(fd: int, path: pathlib.Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False
