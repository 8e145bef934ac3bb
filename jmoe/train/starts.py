"""Every start of a run, kept: by what command, which code, and on what.

`run.json` is a list with a record for each start, the newest last. A run that goes on
adds to it, so what its steps were computed by stays known.
"""

import datetime
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from jmoe.train import run_files

_PACKAGES = ("jmoe", "jax", "flax", "optax", "orbax-checkpoint", "grain")
_ROOT = pathlib.Path(__file__).parents[2]
_GIT_TIMEOUT_S = 10.0


def add_start(workdir: pathlib.Path, **known: Any) -> None:
    """Adds this process to `run.json`, with what the caller knows of it besides.

    The file is old or new, never half.
    """
    path = workdir / run_files.INFO
    start = {
        "command": shlex.join(sys.argv),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **code(),
        **known,
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in _PACKAGES},
    }
    starts = [*run_files.read_starts(path), start]
    run_files.replace_json(path, starts)


def code(root: pathlib.Path = _ROOT) -> dict[str, Any]:
    """Returns the commit of jmoe's clone, and whether files differ from it (`dirty`).

    Both are None where jmoe isn't in a clone, or git doesn't tell.
    """
    unknown = {"commit": None, "dirty": None}
    # An installed jmoe may lie in somebody else's clone, whose commit says nothing.
    if not (root / ".git").exists() or shutil.which("git") is None:
        return unknown
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain")
    except (subprocess.SubprocessError, OSError):
        return unknown
    return {"commit": commit, "dirty": bool(changes)}


def _git(root: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=root,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # it only looks
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_TIMEOUT_S,
    )
    return done.stdout.strip()
