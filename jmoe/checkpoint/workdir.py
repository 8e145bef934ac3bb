"""A run's directory: its `config.json`, and what may change when the run goes on.

runs/tiny/config.json    the record of the run
runs/tiny/checkpoints/   see `jmoe.checkpoint.store`
"""

import filecmp
import fnmatch
import json
import pathlib
import time
from typing import Any

from jmoe import families
from jmoe.config import RunConfig, checks, from_dict, to_dict
from jmoe.data import durable, tokenizer
from jmoe.parallel import processes

CONFIG = "config.json"
_UNFINISHED = durable.unfinished(pathlib.Path(CONFIG)).name

# What decides the shapes and the meaning of a checkpoint's arrays and data position:
FIXED = (
    "model",
    "data",
    "initial_weights",
    "optimizer.name",
    "optimizer.moment_dtype",
    "train.microbatch_size",
    "train.seed",
)
# and what, within that, only decides how the same things are computed or written for
# others, or where the data lies: whether it is the same, the loader knows by content.
FREE = (
    "model.family",
    "model.remat",
    "model.moe.backend",
    "model.moe.remat",
    "model.moe.exchange",
    "model.attention.block_size",
    "data.cache_dir",
    "data.on_corrupt",
    "data.sources.*.path",
)
_TOKENIZER = "data.tokenizer"


def check_run(workdir: pathlib.Path, run: RunConfig) -> bool:
    """Returns whether `workdir` holds a run that `run` can go on with.

    Changes nothing.

    Raises:
      ValueError: a family that isn't known; `workdir` is a file, or holds something
        else than a run, or a run with another model, data or optimizer state; names the
        fields and both values.
    """
    families.lookup(run.model.family)
    workdir = pathlib.Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir={str(workdir)!r} must be a directory.")
    if not (workdir / CONFIG).exists():
        _refuse_other_content(workdir)
        return False
    refused = fixed_changes(read_run(workdir), run)
    if _TOKENIZER in refused and _is_own_tokenizer(workdir, run.data.tokenizer):
        del refused[_TOKENIZER]
    if refused:
        lines = [
            f"  {name}: {a!r} there, {b!r} given" for name, (a, b) in refused.items()
        ]
        raise ValueError(
            f"workdir={str(workdir)!r} holds a run with other values of these fields, "
            "which must stay; choose another workdir:\n" + "\n".join(lines)
        )
    return True


def open_run(workdir: pathlib.Path, run: RunConfig) -> bool:
    """Makes `workdir` the directory of `run`, or goes on in it; whether it goes on.

    A new or empty directory gets a `config.json`. One that has it is checked by
    `check_run`, and the file rewritten if the fields that differ may change between two
    stretches of one run (steps, intervals, learning rate, ...).
    """
    workdir = pathlib.Path(workdir)
    if not check_run(workdir, run):
        _write(workdir, run)
        return False
    if changes(workdir, run):
        _write(workdir, run)
    return True


def changes(workdir: pathlib.Path, run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns what differs from the record in `workdir`: name -> (old, new).

    Nothing does where there is no record.
    """
    if not (pathlib.Path(workdir) / CONFIG).exists():
        return {}
    return _changes(to_dict(read_run(workdir)), to_dict(run))


def fixed_changes(
    old: RunConfig, new: RunConfig, fixed: tuple[str, ...] = FIXED
) -> dict[str, tuple[Any, Any]]:
    """Returns what differs within `fixed` and isn't `FREE`: name -> (old, new)."""
    return {
        name: pair
        for name, pair in _changes(to_dict(old), to_dict(new)).items()
        if _is_in(name, fixed) and not _is_in(name, FREE)
    }


def check_shared(path: pathlib.Path, timeout_s: float = 60.0) -> None:
    """Refuses to go on where a file that process 0 wrote isn't the same for all.

    Args:
      timeout_s: for file systems that take a while to show it.

    Raises:
      ValueError: on every process; names the directory.
    """
    written = processes.from_first("shared file", path.read_text)
    deadline = time.monotonic() + timeout_s
    while not path.exists() or path.read_text() != written:
        if time.monotonic() > deadline:
            raise ValueError(
                f"workdir={str(path.parent)!r} must be one directory for all "
                f"processes, but here it lacks what process 0 wrote to {path.name}."
            )
        time.sleep(0.1)
    processes.exchange("shared file seen", None)


def read_run(workdir: pathlib.Path) -> RunConfig:
    """Returns the record in a workdir's `config.json`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it isn't JSON, or has fields that this version doesn't know.
    """
    return read_record(pathlib.Path(workdir) / CONFIG)


def read_record(path: pathlib.Path) -> RunConfig:
    """Returns the record in a file; raises as `read_run` does."""
    try:
        return from_dict(RunConfig, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the record of a run: {error}") from error


def _refuse_other_content(workdir: pathlib.Path) -> None:
    names = sorted(path.name for path in workdir.glob("*") if path.name != _UNFINISHED)
    if names:
        raise ValueError(
            f"workdir={str(workdir)!r} has no {CONFIG} but holds {names[0]!r}; it must "
            "be a new or empty directory, or that of an earlier run."
        )


def _write(workdir: pathlib.Path, run: RunConfig) -> None:
    durable.make_directory(workdir)
    durable.write_text(workdir / CONFIG, json.dumps(to_dict(run), indent=2))


def _changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Returns dotted name -> (old, new) of values that differ between nested dicts.

    Lists of one length count as dicts by index.
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = (dict(enumerate(items)) for items in (old, new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {"": (old, new)}
    changes = {}
    for name in {**old, **new}:
        for below, pair in _changes(old.get(name), new.get(name)).items():
            changes[f"{name}.{below}".rstrip(".")] = pair
    return changes


def _is_in(name: str, fields: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, form) for f in fields for form in (f, f"{f}.*"))


def _is_own_tokenizer(workdir: pathlib.Path, given: str) -> bool:
    """Returns whether the file `given` is what the run keeps a copy of."""
    try:
        path = checks.local_path("tokenizer", given)
        return filecmp.cmp(path, workdir / tokenizer.FILE, shallow=False)
    except (OSError, ValueError):
        return False
