"""Where prepared data is kept, and how it gets there in one piece."""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable

from jmoe.config.data import DataConfig
from jmoe.data import durable


def directory(cfg: DataConfig) -> pathlib.Path:
    """`cfg.cache_dir`, or the user's cache directory where that is empty."""
    if cfg.cache_dir:
        return pathlib.Path(cfg.cache_dir).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(user_cache).expanduser() / "jmoe"


def key(*parts: str | int | float | bytes) -> str:
    """A file name that stands for exactly these parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:32]


def made_once(path: pathlib.Path, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """The directory `path`, filled by `make(directory)` unless it exists already.

    It is made aside and renamed into place, so that no reader ever sees half of it,
    and of several processes making it at once the first wins.
    """
    if path.exists():
        return path
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
