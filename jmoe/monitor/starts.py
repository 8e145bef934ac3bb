"""Every start of a run, kept: by what command, which code, and on what.

`run.json` is a list with a record for each start, the newest last. A run that goes on
adds to it, so what its steps were computed by stays known, and says what has changed.
"""

import datetime
import hashlib
import json
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

from jmoe.monitor import run_files
from jmoe.parallel import processes

_PACKAGES = ("jmoe", "jax", "flax", "optax", "orbax-checkpoint", "grain")
_ROOT = pathlib.Path(__file__).parents[2]
_GIT_TIMEOUT_S = 10.0
_LISTED_CHANGES = 12


class Start(NamedTuple):
    """The record of this start, and of the one before it if there is any."""

    now: dict[str, Any]
    before: dict[str, Any] | None


def add_start(workdir: pathlib.Path, **known: Any) -> Start:
    """Adds this process to `run.json`, with what the caller knows of it besides.

    The file is old or new, never half.
    """
    path = workdir / run_files.INFO
    fingerprint = json.dumps(processes.code_fingerprint()).encode()
    now = {
        "command": shlex.join(sys.argv),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **commit(),
        "code": hashlib.sha256(fingerprint).hexdigest()[:12],
        **known,
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in _PACKAGES},
    }
    starts = run_files.read_starts(path)
    run_files.replace_json(path, [*starts, now])
    return Start(now, starts[-1] if starts else None)


def since(start: Start, changed: Mapping[str, tuple[Any, Any]]) -> str | None:
    """Returns a line that says what has changed since the start before.

    None where this is the first one. What an older record doesn't tell is left out.

    Args:
      changed: fields of the run's record: name -> (old, new).
    """
    if start.before is None:
        return None
    before, now = _facts(start.before), _facts(start.now)
    facts = {
        name: (before[name], now[name])
        for name in before
        if name in now and before[name] != now[name]
    }
    listed = [f"{name} {old} -> {new}" for name, (old, new) in facts.items()]
    listed += [f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items()]
    if len(listed) > _LISTED_CHANGES:
        more = len(listed) - _LISTED_CHANGES
        listed[_LISTED_CHANGES:] = [f"and {more} more, see config.json"]
    return f"Since the last start: {'; '.join(listed) or 'nothing has changed'}."


def _facts(start: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run's steps are computed by, as the record of a start has it."""
    facts = {}
    if start.get("commit"):
        edited = " with changes" if start.get("dirty") else ""
        facts["commit"] = f"{start['commit'][:9]}{edited}"
    facts |= {
        key: start[key] for key in ("code", "device", "processes") if key in start
    }
    return facts | start.get("versions", {})


def commit(root: pathlib.Path = _ROOT) -> dict[str, Any]:
    """Returns the commit of jmoe's clone, and whether files differ from it (`dirty`).

    Both are None where jmoe isn't in a clone, or git doesn't tell.
    """
    unknown = {"commit": None, "dirty": None}
    # An installed jmoe may lie in somebody else's clone, whose commit says nothing.
    if not (root / ".git").exists() or shutil.which("git") is None:
        return unknown
    try:
        head = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain")
    except (subprocess.SubprocessError, OSError):
        return unknown
    return {"commit": head, "dirty": bool(changes)}


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
