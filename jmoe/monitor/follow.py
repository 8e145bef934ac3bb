"""Follows what goes on in another process: a run by its files, vLLM by its metrics.

Neither needs to know of it. A run is read as `jmoe.monitor.run_files` describes it,
while it trains or afterwards.
"""

import http.client
import pathlib
import urllib.request
from typing import Any, Protocol

import numpy as np

from jmoe.monitor import balance_log, run_files
from jmoe.monitor.snapshot import Snapshot
from jmoe.monitor.training import TrainingMeter
from jmoe.monitor.vllm import VllmMeter

_TIMEOUT = 10.0
_MOST_BYTES = 1 << 24  # of a page of metrics


class Follower(Protocol):
    """Something to look at again and again, and to show in between."""

    def look(self) -> None: ...

    def snapshot(self) -> Snapshot: ...

    def prometheus(self) -> bytes: ...


class RunFollower:
    """Follows the run of a directory.

    Raises:
      ValueError: the directory holds no run.
    """

    def __init__(self, workdir: pathlib.Path):
        if not (workdir / run_files.CONFIG).is_file():
            raise ValueError(
                f"workdir={str(workdir)!r} holds no run: it has no {run_files.CONFIG}."
            )
        self._workdir = workdir
        self._now = 0.0
        self._begin()
        self.look()

    def look(self) -> None:
        """Takes what was logged since the last look."""
        path = self._workdir / run_files.METRICS
        size = path.stat().st_size if path.exists() else 0
        if size < self._read:  # the run goes on from a checkpoint, or is another
            self._begin()
        if size > self._read:
            with path.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # the rest is being written
                    self._read += len(line)
                    self._take(line)
        self._take_balance()

    def snapshot(self) -> Snapshot:
        return self._meter.snapshot()

    def prometheus(self) -> bytes:
        return self._meter.prometheus()

    def _begin(self) -> None:
        run = run_files.read_record(self._workdir / run_files.CONFIG)
        starts = run_files.read_starts(self._workdir / run_files.INFO)
        self._read = 0
        self._steps = run.get("train", {}).get("steps", 0)
        self._meter = TrainingMeter(
            run.get("name", self._workdir.name),
            self._steps,
            _devices(run),
            device=(starts or [{}])[-1].get("device", ""),
            clock=lambda: self._now,
        )

    def _take(self, line: bytes) -> None:
        row = run_files.parse_row(line.decode(errors="replace"))
        if row is None:
            return
        self._now = row.pop("time", self._now)
        step = row.pop("step")
        metrics = {key: np.asarray(row[key], float) for key in row}
        self._meter.log(step, metrics)
        if step >= self._steps:
            self._meter.finish("complete")

    def _take_balance(self) -> None:
        records = balance_log.read_records(self._workdir / run_files.BALANCE)
        if records is not None:
            last = records[-1]
            self._meter.balance(int(last["step"]), np.array(last["load_LE"]))


def _devices(run: dict[str, Any]) -> int:
    """Returns how many devices hold consecutive experts, by a run's record."""
    may_move = run.get("train", {}).get("reassign_every")
    return 1 if may_move else run.get("mesh", {}).get("expert", 1)


class VllmFollower:
    """Follows a vLLM server.

    Args:
      endpoint: its address, with or without the `/v1` that clients want.
      key: that it asks for, if any.

    Raises:
      ValueError: nothing answers there, or it isn't vLLM.
    """

    def __init__(self, endpoint: str, key: str | None = None):
        base = endpoint.rstrip("/").removesuffix("/metrics").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ValueError(
                f"endpoint={endpoint!r} must begin with http:// or https://."
            )
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._request = urllib.request.Request(f"{base}/metrics", headers=headers)
        self._endpoint = endpoint
        self._meter = VllmMeter()
        self.snapshot, self.prometheus = self._meter.snapshot, self._meter.prometheus
        self.look()

    def look(self) -> None:
        """Takes what the server says now; raises ValueError as the class does."""
        try:
            with _OPENER.open(self._request, timeout=_TIMEOUT) as answer:
                text = answer.read(_MOST_BYTES).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"endpoint={self._endpoint!r}: {error}") from error
        self._meter.add(text)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: to another host, the key would go along."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)
