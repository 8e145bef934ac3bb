"""The files of a run directory: their names, their rows, and how they are read back.

    config.json     the run's configuration, nested records as plain dicts
    run.json        a list with a record for each start: command, started, commit and
                    dirty (of jmoe's clone), code (a hash of jmoe's source), device
                    (text), processes, versions {name: text}, parameters,
                    active_parameters, unigram_entropy (nats per token)
    metrics.jsonl   {"step", "time", scalars, lists over layers or MTP depths, and of
                    devices that lend experts "lent_PP", lender by borrower} a log
    balance.npy     {"step", "load_LE", "bias_LE"} of some logs, a layer's loads sum
                    to 1 (`jmoe.monitor.balance_log`)
    roll_backs.jsonl  {"step" gone back to, "sequences" [begin, end] left out there,
                    "spoilt" (the step that made it go back), "reason"}
    samples.jsonl   {"step", "prompt", "text"} a text generated to follow a prompt
    tensorboard/    metrics.jsonl again, without matrices, as TensorBoard events

JSON has no word for a number that isn't finite. It is written as one of the strings
"NaN", "Infinity" and "-Infinity", which `float` and `np.asarray(_, float)` understand.

Reading forgives what a killed process leaves behind: a file that is missing, or a line
that was cut short, is as good as never recorded.

Shapes: N logs, K columns of a metric, L MoE layers, E routed experts.
"""

import dataclasses
import json
import mmap
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jmoe.data import durable
from jmoe.monitor import balance_log

CONFIG = "config.json"
INFO = "run.json"
METRICS = "metrics.jsonl"
BALANCE = "balance.npy"
ROLL_BACKS = "roll_backs.jsonl"
SAMPLES = "samples.jsonl"
TENSORBOARD = "tensorboard"
REPORT = "report.html"

# What bounds a report's size: the loads kept of all layers and logs, and the logs.
_MAX_LOADS = 800_000
_MAX_COLUMNS = 400


class Series(NamedTuple):
    """One metric over time; a scalar has K = 1."""

    step_N: np.ndarray  # int64
    value_NK: np.ndarray  # float64


class Balance(NamedTuple):
    """Expert load and selection bias at N evenly spaced logs."""

    step_N: np.ndarray  # int64
    load_NLE: np.ndarray  # float32, in units of the fair share: 1.0 is balanced
    bias_NLE: np.ndarray  # float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory holds; empty or None where nothing was recorded."""

    directory: pathlib.Path
    config: dict[str, Any]
    info: dict[str, Any]  # of the last start
    rows: list[dict[str, Any]]  # one a step, in order
    samples: list[dict[str, Any]]
    balance: Balance | None

    def series(self, key: str) -> Series | None:
        """Returns the metric `key` at the steps that logged it, or None."""
        rows = [row for row in self.rows if key in row]
        if not rows:
            return None
        step_N = np.array([row["step"] for row in rows], dtype=np.int64)
        value_NK = np.array([row[key] for row in rows], dtype=np.float64)
        return Series(step_N, value_NK.reshape(len(rows), -1))

    def last(self, key: str) -> np.ndarray | None:
        """Returns the metric's last value as an array of K, or None."""
        series = self.series(key)
        return None if series is None else series.value_NK[-1]


def read_run(run_dir: str | pathlib.Path) -> Run:
    """Reads a run directory.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    directory = pathlib.Path(run_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"run_dir={str(run_dir)!r} is not a directory.")
    merged: dict[int, dict[str, Any]] = {}
    for row in read_rows(directory / METRICS):
        merged.setdefault(row["step"], {}).update(row)
    return Run(
        directory=directory,
        config=read_record(directory / CONFIG),
        info=([{}] + read_starts(directory / INFO))[-1],
        rows=[merged[step] for step in sorted(merged)],
        samples=list(read_rows(directory / SAMPLES)),
        balance=_read_balance(directory / BALANCE),
    )


def read_starts(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns a `run.json`'s records, by time; none if it is missing or damaged."""
    starts = _read_json(path)
    if isinstance(starts, dict):  # of a run that began before starts were kept
        return [starts]
    return starts if isinstance(starts, list) else []


def replace_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file that is old or new, never half."""
    durable.write_text(path, json.dumps(value, indent=2))


def read_lines(path: pathlib.Path) -> Iterator[str]:
    """Yields the lines of a text file, each with its newline; none if missing."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


def read_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the whole rows of a `.jsonl` file; none if it is missing."""
    return filter(None, map(parse_row, read_lines(path)))


def parse_row(line: str) -> dict[str, Any] | None:
    """Returns the row that `line` holds, or None if it isn't whole."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def drop_rows(path: pathlib.Path, after: int) -> None:
    """Cuts a `.jsonl` file behind its last whole row of no later step than `after`.

    It reads from the end, where rows are of later steps: some, of a file of gigabytes.
    """
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            while end:
                start = data.rfind(b"\n", 0, end - 1) + 1
                row = parse_row(data[start:end].decode(errors="replace"))
                if row is not None and row["step"] <= after:
                    break
                end = start
            has_newline = not end or data[end - 1 : end] == b"\n"
        file.truncate(end)
        file.seek(end)
        file.write(b"" if has_newline else b"\n")


def evenly(num_items: int, limit: int) -> np.ndarray:
    """Returns indices of at most `limit` (or 2) items, first and last among them."""
    num_kept = min(num_items, max(2, limit))
    return np.linspace(0, num_items - 1, num_kept).round().astype(np.int64)


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """Returns a run's record as plain dicts; nothing if it is missing or damaged."""
    record = _read_json(path)
    return record if isinstance(record, dict) else {}


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _read_balance(path: pathlib.Path) -> Balance | None:
    """Reads only the records it keeps: a big model's file has hundreds of megabytes."""
    records_N = balance_log.read_records(path)
    if records_N is None:
        return None
    num_layers, num_experts = records_N.dtype["load_LE"].shape
    limit = min(_MAX_COLUMNS, _MAX_LOADS // (num_layers * num_experts))
    kept_N = records_N[evenly(len(records_N), limit)]
    kept_N = kept_N[kept_N["step"] > 0]  # a power cut may have left zeros
    if not len(kept_N):
        return None
    load_NLE = kept_N["load_LE"] * num_experts
    return Balance(kept_N["step"], load_NLE, kept_N["bias_LE"])
