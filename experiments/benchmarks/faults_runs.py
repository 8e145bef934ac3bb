"""The tiny run that faults befall, and what a run leaves, to compare with another's.

The run is that of tests/smallest_run.py on a text of a few kilobytes: routed experts
with their bias, MTP, AdamW's moments, a position in shuffled data. It saves so often
that it saves most of the time, and keeps several checkpoints.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from jmoe.checkpoint import manifest
from jmoe.checkpoint.pieces import Pieces
from jmoe.config import RunConfig, override
from jmoe.data import durable
from jmoe.monitor import run_files
from jmoe.train.trained import CHECKPOINTS, TOKENIZER
from tests import smallest_run
from tests.train import whole_runs

STEPS = 30
SAVE_EVERY = 3
KEPT = 3

_FILES = (run_files.CONFIG, TOKENIZER, run_files.SAMPLES, run_files.BALANCE)
_SHOWN = 3  # names of a difference


def settings(directory: pathlib.Path) -> list[str]:
    """What `--set` makes the smallest run this one, with its data in `directory`.

    Those who have one directory find compiled what others have compiled.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = directory / "squares.txt"
    documents = (f"The square of {i} is {i * i}. " * 3 for i in range(80))
    durable.write_text(text, "<|endoftext|>".join(documents))
    return [
        f"train.steps={STEPS}",
        "train.batch_size=4",
        "train.microbatch_size=4",
        "train.ramp_start=none",
        "train.ramp_steps=0",
        f"train.eval_every={STEPS // 2}",
        f"train.checkpoint_every={SAVE_EVERY}",
        f"train.keep_checkpoints={KEPT}",
        f"data.sources=[{{'path': '{text}'}}]",
        f"data.cache_dir={directory / 'cache'}",
    ]


def tiny_run(directory: pathlib.Path) -> RunConfig:
    return override(smallest_run.get_config(), settings(directory))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Everything in it: the position, and a digest of each array's bits."""

    position: dict[str, Any]
    arrays: dict[str, str]


@dataclasses.dataclass(frozen=True)
class End:
    """What must not depend on the faults that a run met.

    rows: of metrics, without times. others: names in the directory of checkpoints that
    aren't theirs.
    """

    checkpoints: dict[int, Checkpoint]
    rows: list[dict[str, Any]]
    files: dict[str, bytes | None]
    others: list[str]


def read_end(workdir: pathlib.Path) -> End:
    """Raises ValueError where a checkpoint is damaged."""
    files = {name: workdir / name for name in _FILES}
    names = sorted(path.name for path in (workdir / CHECKPOINTS).iterdir())
    return End(
        {step: read_checkpoint(workdir, step) for step in steps_saved(workdir)},
        whole_runs.rows(workdir),
        {n: path.read_bytes() if path.exists() else None for n, path in files.items()},
        [name for name in names if not name.isdecimal()],
    )


def steps_saved(workdir: pathlib.Path) -> list[int]:
    """Steps whose checkpoints have got their names, oldest first."""
    names = [path.name for path in (workdir / CHECKPOINTS).glob("*")]
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def read_checkpoint(workdir: pathlib.Path, step: int) -> Checkpoint:
    """Raises ValueError where it is damaged."""
    directory = workdir / CHECKPOINTS / str(step)
    pieces = Pieces(directory)
    pieces.check_sums()
    return Checkpoint(
        manifest.read(directory)["position"],
        {name: digest(pieces.read(name, ())) for name in pieces.shapes},
    )


def digest(array: Any) -> str:
    """Stands for an array's dtype, shape and bits."""
    head = f"{array.dtype} {array.shape} "
    return head + hashlib.sha256(array.tobytes()).hexdigest()


def differences(got: End, want: End) -> Iterator[str]:
    """What isn't the same, to the bit."""
    found, asked = list(got.checkpoints), list(want.checkpoints)
    if found != asked:
        yield f"checkpoints: {found} instead of {asked}"
    for step in got.checkpoints.keys() & want.checkpoints.keys():
        yield from checkpoint_differences(
            step, got.checkpoints[step], want.checkpoints[step]
        )
    found, asked = ([row["step"] for row in end.rows] for end in (got, want))
    if found != asked:
        yield f"{run_files.METRICS}: steps {found} instead of {asked}"
    elif got.rows != want.rows:
        yield f"{run_files.METRICS}: other numbers"
    for name, content in want.files.items():
        if got.files[name] != content:
            yield f"{name} differs"
    if got.others != want.others:
        yield f"left beside the checkpoints: {', '.join(got.others)}"


def checkpoint_differences(
    step: int, got: Checkpoint, want: Checkpoint
) -> Iterator[str]:
    if got.position != want.position:
        yield f"checkpoint {step}: another position"
    names = want.arrays.keys() | got.arrays.keys()
    other = sorted(n for n in names if got.arrays.get(n) != want.arrays.get(n))
    if other:
        shown = ", ".join(other[:_SHOWN])
        yield f"checkpoint {step}: {len(other)} arrays differ: {shown}"
