"""Writes what a run measures: metrics.jsonl, balance.npy and TensorBoard events.

`jmoe.monitor.run_files` describes the rows. Every log is flushed, so a crash loses
nothing, and synced before a checkpoint, so that a power cut loses nothing before that.
Where one can't be written, training goes on (`jmoe.monitor.output`).
A run that goes on from a checkpoint first drops the rows of steps it is about
to repeat, so curves never overlap.

Shapes: L MoE layers, E routed experts.
"""

import contextlib
import json
import math
import pathlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

from jmoe.monitor import output, run_files
from jmoe.monitor.balance_log import BalanceLog

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
      followers: are called with every row, as `log` is.
    """

    def __init__(
        self,
        run_dir: str | pathlib.Path,
        *,
        start_step: int,
        followers: Sequence[Callable[..., None]] = (),
    ):
        directory = pathlib.Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._followers = followers
        self._metrics = _resume(directory / run_files.METRICS, start_step)
        balance = directory / run_files.BALANCE
        self._balance = BalanceLog(balance, start_step=start_step)
        self._balance_trouble = output.Troubled(str(balance))
        self._tensorboard = directory / run_files.TENSORBOARD
        self._events: RecordWriter | None = _open_events(self._tensorboard, start_step)
        self._events_trouble = output.Troubled(str(self._tensorboard))

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
          metrics: scalars, vectors and matrices, on the host.
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
        if self._metrics.add(_to_json(row)):  # else there is no room for events either
            self._events_trouble.attempt(self._log_event, step, now, metrics)
        if load_LE is not None and bias_LE is not None:
            append = self._balance.append
            self._balance_trouble.attempt(append, step, load_LE, bias_LE)
        for follow in self._followers:
            follow(step, metrics, load_LE=load_LE, bias_LE=bias_LE)

    def sync(self) -> None:
        """Returns when all rows are on the disk, from where events can be remade."""
        self._metrics.sync()
        self._balance_trouble.attempt(self._balance.sync)

    def close(self) -> None:
        """Closes the files; a closed log takes no more rows."""
        self._metrics.close()
        self._balance_trouble.attempt(self._balance.close)
        if self._events is not None:
            self._events_trouble.attempt(self._events.close)

    def _log_event(
        self, step: int, now: float, metrics: Mapping[str, ArrayLike]
    ) -> None:
        """Begins a new file after a failure, which may have left half an event."""
        events, self._events = self._events, None
        if events is None:
            events = _open_events(self._tensorboard, step - 1)
        _write_events(events, _to_event(step, now, metrics))
        self._events = events

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _resume(path: pathlib.Path, start_step: int) -> output.Lines:
    """Opens `path` for appending, without what comes after `start_step`."""
    if path.exists():
        run_files.drop_rows(path, after=start_step)
    return output.Lines(path)


def _to_json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False, separators=(",", ":"))


def _plain(values: ArrayLike | None, digits: int) -> Any:
    """Returns numbers and nested lists of them for JSON, rounded to `digits`."""
    return _round(np.asarray(values).tolist(), digits)


def _round(value: Any, digits: int) -> Any:
    if isinstance(value, list):
        return [_round(item, digits) for item in value]
    if not isinstance(value, float):
        return value
    if math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _open_events(directory: pathlib.Path, start_step: int) -> RecordWriter:
    """Opens an event file that makes TensorBoard forget the steps past `start_step`.

    tensorboardX's SummaryWriter has a queue and a thread, which lose the last events
    when a process is killed.
    """
    directory.mkdir(exist_ok=True)
    now = time.time()
    name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{start_step}"
    events = RecordWriter(str(directory / name))
    version = Event(wall_time=now, file_version="brain.Event:2")
    restart = SessionLog(status=SessionLog.START)
    _write_events(events, version, Event(step=start_step + 1, session_log=restart))
    return events


def _write_events(events: RecordWriter, *new: Any) -> None:
    """Closes the file if it raises OSError."""
    try:
        for event in new:
            events.write(event.SerializeToString())
        events.flush()
    except OSError:
        with contextlib.suppress(OSError):
            events.close()
        raise


def _to_event(step: int, now: float, metrics: Mapping[str, ArrayLike]) -> Any:
    """Returns a step's metrics as one event; a vector has a tag for each element.

    Matrices aren't curves, and are left out.
    """
    summary = Summary()
    for key in metrics:
        values = np.asarray(metrics[key], dtype=np.float64)
        if values.ndim == 0:
            summary.value.add(tag=f"metrics/{key}", simple_value=float(values))
        elif values.ndim == 1:
            for at, value in enumerate(values.tolist()):
                summary.value.add(tag=f"{key}/{at:02d}", simple_value=value)
    return Event(step=step, wall_time=now, summary=summary)
