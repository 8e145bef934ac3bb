"""What a training run shows of itself while it trains: what it logs anyhow.

The trainer's thread reports, others read. Nothing here touches a device.

Shapes: L MoE layers, E routed experts, P devices.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jmoe.monitor import training_page
from jmoe.monitor.decisions import Decision, Decisions
from jmoe.monitor.snapshot import Snapshot
from jmoe.monitor.thinned import Thinned


class TrainingMeter:
    """Follows a run from its log. Any thread may call anything.

    Args:
      name: of the run.
      steps: that the run has.
      num_devices: that share the experts of a layer, consecutive ones each; 1 if others
        may lie on them.
      device: what the run is on, in words.
      clock: Unix time in seconds.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        num_devices: int = 1,
        *,
        device: str = "",
        clock: Callable[[], float] = time.time,
    ):
        self._about = training_page.About(name, steps, num_devices, device)
        self._clock = clock
        self._lock = threading.RLock()
        self._notes = Decisions()
        self._state = training_page.Standing(clock())
        self._logs = Thinned()
        self._evaluations = Thinned()

    def log(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        load_LE: ArrayLike | None = None,
        bias_LE: ArrayLike | None = None,
    ) -> None:
        """Takes a row as `MetricsLog.log` does; arrays aren't copied."""
        with self._lock:
            state = self._state
            state.logged(step, metrics, self._clock())
            if load_LE is not None:
                self.balance(step, load_LE)
            kept = training_page.kept(metrics)
            if kept:
                history = self._logs if "loss" in metrics else self._evaluations
                history.add(step, kept)
            if "experts_moved_L" in metrics:
                now = self._clock()
                self._notes.add(training_page.reassigned(now, step, metrics))

    def balance(self, step: int, load_LE: ArrayLike) -> None:
        """Takes each expert's share of its layer's choices in the batch of `step`."""
        with self._lock:
            self._state.load_LE = np.asarray(load_LE)
            self._state.load_step = step

    def note(self, text: str) -> None:
        """Takes a line that the console leaves, say that a checkpoint was saved."""
        self._notes.add(Decision(self._clock(), "note", "", text))

    def finish(self, status: str) -> None:
        """Says how the run ended, such as "complete"."""
        with self._lock:
            self._state.ended = status

    def snapshot(self) -> Snapshot:
        """Returns what the page shows now."""
        with self._lock:
            state = self._state.copy()
            histories = self._logs.points(), self._evaluations.points()
        return training_page.make(self._about, state, *histories, self._notes.latest())

    def prometheus(self) -> bytes:
        """Returns what Prometheus reads, in its text format."""
        from jmoe.monitor import training_metrics  # which needs prometheus-client

        with self._lock:
            state = self._state.copy()
        return training_metrics.page(self._about, state)
