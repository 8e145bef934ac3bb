"""What a server measures of itself: since its start and, for the page, lately.

The engine's thread reports steps, HTTP's threads report requests, and others read. A
step costs a few additions under a lock.

Shapes: L MoE layers, E routed experts, P devices.
"""

import copy
import threading
import time
from collections.abc import Callable

import numpy as np

from jmoe.monitor import latency, recent, serving_page
from jmoe.monitor.decisions import Decision, Decisions
from jmoe.monitor.serving_totals import Totals
from jmoe.monitor.snapshot import Snapshot


class ServingMeter:
    """Takes what happens in a server; any thread may call any of its methods.

    Args:
      name: of the model.
      num_layers, num_experts: of its MoE layers, and in each of them.
      num_devices: that share its experts.
      clock: Unix time in seconds.

    Raises:
      ValueError: devices can't hold equally many of the experts.
    """

    def __init__(
        self,
        name: str,
        num_layers: int,
        num_experts: int,
        num_devices: int = 1,
        *,
        clock: Callable[[], float] = time.time,
    ):
        if num_devices < 1 or num_experts % num_devices:
            raise ValueError(
                f"num_devices={num_devices} must divide num_experts={num_experts}."
            )
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._decisions = Decisions()
        self._recent = recent.Recent(clock())
        self._totals = Totals(
            count_LE=np.zeros((num_layers, num_experts), np.int64),
            device_LP=np.zeros((num_layers, num_devices), np.int64),
            dropped_L=np.zeros(num_layers, np.int64),
            steps=latency.Durations(latency.STEP),
            first_token=latency.Durations(latency.FIRST_TOKEN),
            between_tokens=latency.Durations(latency.BETWEEN_TOKENS),
        )

    def step(
        self,
        *,
        seconds: float,
        rows: int,
        prompt_tokens: int,
        new_tokens: int,
        drafted: int,
        accepted: int,
        waiting: int,
        live: int,
        pages_used: int,
        pages: int,
        count_LE: np.ndarray,
        device_LP: np.ndarray | None = None,
        dropped_L: np.ndarray | None = None,
        lent: int = 0,
        in_fp8: bool = False,
    ) -> None:
        """Takes what one step of the engine did (`jmoe.decode.stats.StepStats`).

        Args:
          device_LP: choices that each device computed; by default those of experts that
            lie on the devices in their order, equally many on each.
          dropped_L: choices that no device computed.
          lent: experts that were computed elsewhere than where they lie.
          in_fp8: whether tokens travelled to experts in FP8.
        """
        with self._lock:
            now, totals = self._clock(), self._totals
            layers, devices = totals.device_LP.shape
            own_LP = count_LE.reshape(layers, devices, -1).sum(-1)
            computed_LP = own_LP if device_LP is None else device_LP
            part = self._recent.part(now)
            for counted in (totals, part):
                counted.prompt_tokens += prompt_tokens
                counted.new_tokens += new_tokens
                counted.drafted += drafted
                counted.accepted += accepted
                counted.running, counted.waiting = live, waiting
            part.add_choices(count_LE, computed_LP)
            totals.count_LE += count_LE
            totals.device_LP += computed_LP
            if dropped_L is not None:
                totals.dropped_L += dropped_L
            totals.rows += rows
            totals.experts_lent += lent
            totals.fp8_steps += in_fp8
            totals.in_fp8 = in_fp8
            totals.pages_used, totals.pages = pages_used, pages
            totals.steps.add(seconds)
            totals.last_step = now

    def request_started(self) -> None:
        """Takes a request that was admitted."""
        with self._lock:
            self._totals.requests += 1

    def first_token(self, seconds: float) -> None:
        """Takes the time from a request's arrival to its first token."""
        with self._lock:
            self._totals.first_token.add(seconds)
            self._recent.part(self._clock()).first_token.add(seconds)

    def between_tokens(self, seconds: float, tokens: int = 1) -> None:
        """Takes the time since a request's last token.

        Args:
          tokens: that came together after it, each of which gets its part of the time.
        """
        with self._lock:
            part = self._recent.part(self._clock())
            for durations in (self._totals.between_tokens, part.between_tokens):
                durations.add(seconds / tokens, tokens)

    def request_ended(self, reason: str, tokens: int) -> None:
        """Takes an answer's end: "stop", "length", "cancelled", ... after `tokens`."""
        with self._lock:
            self._totals.ended[reason] += 1
            self._totals.answered_tokens += tokens

    def refused(self, status: int) -> None:
        """Takes a request that wasn't admitted, by its HTTP status."""
        with self._lock:
            self._totals.refused[status] += 1

    def moved(self, experts: int) -> None:
        """Takes how many experts' weights went to another device, for good."""
        with self._lock:
            self._totals.experts_moved += experts

    def decided(self, decision: Decision) -> None:
        self._decisions.add(decision)

    def totals(self) -> Totals:
        """Returns a copy, whose numbers are of one moment."""
        with self._lock:
            return copy.deepcopy(self._totals)

    def snapshot(self) -> Snapshot:
        """Returns what the page shows now."""
        with self._lock:
            totals, now = copy.deepcopy(self._totals), self._clock()
            shown = serving_page.lately(self._recent, now)
        return serving_page.make(
            self._name, now, totals, shown, self._decisions.latest()
        )

    def prometheus(self) -> bytes:
        """Returns what Prometheus reads, in its text format."""
        from jmoe.monitor import serving_metrics  # which needs prometheus-client

        return serving_metrics.page(
            self._name, self.totals(), self._decisions.counts(), self.snapshot()
        )
