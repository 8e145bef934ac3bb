"""Where prepared data is kept, and how it gets there in one piece."""

import contextlib
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable

from absl import logging

from jmoe.config import checks
from jmoe.config.data import DataConfig
from jmoe.data import durable


def directory(cfg: DataConfig) -> pathlib.Path:
    """`cfg.cache_dir`, or the user's cache directory where that is empty.

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
    """A file name that stands for exactly these parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:32]


def made_once(
    path: pathlib.Path,
    make: Callable[[pathlib.Path], None],
    flaw: Callable[[pathlib.Path], str | None],
) -> pathlib.Path:
    """The directory `path`, filled by `make(directory)` unless it exists already.

    It is made aside and renamed into place, so that no reader ever sees half of it,
    and of several processes making it at once the first wins.

    Args:
      flaw: what is wrong with a directory that was found, such as a file that was cut
        short since; it is then made again, with a warning. None: nothing is.
    """
    if path.exists():
        wrong = flaw(path)
        if wrong is None:
            return path
        logging.warning("%s is damaged (%s): making it again.", path, wrong)
        _remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as aside:
        made = pathlib.Path(aside) / path.name
        made.mkdir()
        make(made)
        try:
            durable.publish(made, path)
        except OSError:
            if not path.exists():
                raise
    return path


def _remove(path: pathlib.Path) -> None:
    """Takes `path` away in one piece, whoever else does so too."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as aside:
        with contextlib.suppress(FileNotFoundError):
            path.rename(pathlib.Path(aside) / path.name)
