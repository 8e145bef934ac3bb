"""Writes what a run measures: metrics.jsonl, balance.npy and TensorBoard events.

`jmoe.train.run_files` describes the rows. Every log is flushed, so a crash loses
nothing, and synced before a checkpoint, so that a power cut loses nothing before that.
A run that goes on from a checkpoint first drops the rows of steps it is about
to repeat, so curves never overlap.

Shapes: L MoE layers, E routed experts.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
from numpy.typing import ArrayLike
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from jmoe.data import durable
from jmoe.train import run_files
from jmoe.train.balance_log import BalanceLog

# Generated messages, which type checkers can't look into.
Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
Summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

_METRIC_DIGITS = 9  # what a float32 needs to survive


class MetricsLog:
    """Appends to the logs of `run_dir`; one process of a run has one.

    Args:
      run_dir: the run's directory, made if absent.
      start_step: the step that training goes on from: 0 for a new run. Rows of later
        steps, written after the checkpoint that is being resumed, are dropped.
    """

    def __init__(self, run_dir: str | pathlib.Path, *, start_step: int):
        directory = pathlib.Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = _resume(directory / run_files.METRICS, start_step)
        balance = directory / run_files.BALANCE
        self._balance = BalanceLog(balance, start_step=start_step)
        self._events = _open_events(directory / run_files.TENSORBOARD, start_step)

    def log(
        self,
        step: int,
        metrics: Mapping[str, ArrayLike],
        *,
        load_LE: ArrayLike | None = None,
        bias_LE: ArrayLike | None = None,
    ) -> None:
        """Writes one row of metrics and passes `load_LE` on to the `BalanceLog`.

        Args:
          step: the optimizer step measured. The rows of one step, say of training and
            of an evaluation, are merged when they are read.
          metrics: scalars and vectors, on the host.
          load_LE: each expert's share of its layer's assignments (a layer sums to 1).
          bias_LE: the selection bias; needed with `load_LE`.

        Raises:
          ValueError: only one of `load_LE` and `bias_LE` is given.
        """
        if (load_LE is None) != (bias_LE is None):
            given = "load_LE" if bias_LE is None else "bias_LE"
            raise ValueError(
                f"{given} is given alone; load_LE and bias_LE go together."
            )
        now = time.time()
        row = {"step": step, "time": round(now, 3)}
        row |= {key: _plain(metrics[key], _METRIC_DIGITS) for key in metrics}
        _append(self._metrics, row)
        self._events.write_event(_to_event(step, now, metrics))
        self._events.flush()
        if load_LE is not None and bias_LE is not None:
            self._balance.append(step, load_LE, bias_LE)

    def sync(self) -> None:
        """Returns when all rows are on the disk, from where events can be remade."""
        os.fsync(self._metrics.fileno())
        self._balance.sync()

    def close(self) -> None:
        """Closes the files; a closed log takes no more rows."""
        self._metrics.close()
        self._balance.close()
        self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _resume(path: pathlib.Path, start_step: int) -> TextIO:
    """Opens `path` for appending, without what comes after `start_step`."""
    file = path.open("a", encoding="utf-8")
    run_files.drop_rows(path, after=start_step)
    durable.sync(path.parent)
    return file


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n")
    file.flush()


def _plain(values: ArrayLike | None, digits: int) -> Any:
    """Numbers and nested lists of them as JSON takes them, rounded to `digits`."""
    return _round(np.asarray(values).tolist(), digits)


def _round(value: Any, digits: int) -> Any:
    if isinstance(value, list):
        return [_round(item, digits) for item in value]
    if not isinstance(value, float):
        return value
    if math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _open_events(directory: pathlib.Path, start_step: int) -> EventsWriter:
    """A new event file that makes TensorBoard forget the steps past `start_step`.

    This is tensorboardX's own file writer without the queue and thread that its
    SummaryWriter puts before it: those lose the last events when a process is killed.
    """
    directory.mkdir(exist_ok=True)
    events = EventsWriter(str(directory / "events"), f".{start_step}")
    restart = SessionLog(status=SessionLog.START)
    events.write_event(Event(step=start_step + 1, session_log=restart))
    return events


def _to_event(step: int, now: float, metrics: Mapping[str, ArrayLike]) -> Any:
    """All metrics of a step as one event; a vector has a tag for each element."""
    summary = Summary()
    for key in metrics:
        values = np.asarray(metrics[key], dtype=np.float64)
        if values.ndim == 0:
            summary.value.add(tag=f"metrics/{key}", simple_value=float(values))
            continue
        for at, value in enumerate(values.tolist()):
            summary.value.add(tag=f"{key}/{at:02d}", simple_value=value)
    return Event(step=step, wall_time=now, summary=summary)
