"""What a server did in the last minutes, in parts of five seconds.

A part that nothing happened in isn't there. Counts of experts are kept for the last
minute's parts alone: a big model's have 119 kB each.

Shapes: L MoE layers, E routed experts, P devices.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from jmoe.monitor import latency
from jmoe.monitor.snapshot import even_share, max_violation_L

SECONDS = 5  # of a part
KEPT = 180  # parts: fifteen minutes
WINDOW = 12  # parts that loads and latencies are counted over: a minute
RATE = 2  # whole parts that a rate is counted over, and what there is of one more


@dataclasses.dataclass
class FiveSeconds:
    """Counts what happened in them. index: their number since 1970."""

    index: int
    prompt_tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    running: int = 0  # at its end
    waiting: int = 0
    count_LE: np.ndarray | None = None  # choices of experts
    device_LP: np.ndarray | None = None  # choices that devices computed
    max_vio: tuple[float, float] | None = None  # median and worst layer's, by WINDOW
    first_token: latency.Durations = dataclasses.field(
        default_factory=lambda: latency.Durations(latency.FIRST_TOKEN)
    )
    between_tokens: latency.Durations = dataclasses.field(
        default_factory=lambda: latency.Durations(latency.BETWEEN_TOKENS)
    )

    def add_choices(self, count_LE: np.ndarray, device_LP: np.ndarray) -> None:
        if self.count_LE is None or self.device_LP is None:
            self.count_LE = np.zeros(count_LE.shape, np.int64)
            self.device_LP = np.zeros(device_LP.shape, np.int64)
        self.count_LE += count_LE
        self.device_LP += device_LP


class Recent:
    """Keeps the latest parts. One thread at a time may use it."""

    def __init__(self, now: float):
        self._begun = now
        self._parts: collections.deque[FiveSeconds] = collections.deque()

    def part(self, now: float) -> FiveSeconds:
        """Returns the part of this moment, for what happens to be added."""
        index = int(now // SECONDS)
        if not self._parts or self._parts[-1].index < index:
            self._close()
            self._parts.append(FiveSeconds(index))
            while self._parts[0].index <= index - KEPT:
                self._parts.popleft()
        return self._parts[-1]  # a clock that was set back stays in the last one

    def rate(self, now: float, counted: Callable[[FiveSeconds], float]) -> float:
        """Returns what is counted a second, over the last ten to fifteen of them."""
        first = int(now // SECONDS) - RATE
        found = sum(counted(part) for part in self._parts if part.index >= first)
        since = max(self._begun, first * SECONDS)
        return found / max(now - since, 1.0)

    def latest(self) -> list[FiveSeconds]:
        """Returns the parts of the minute that ends with the last one."""
        if not self._parts:
            return []
        first = self._parts[-1].index - WINDOW
        return [part for part in self._parts if part.index > first]

    def counts(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns choices [L, E] and [L, P] in that minute; None if there were none.

        An idle server keeps its last minute: parts count, not the clock.
        """
        counts = [
            (part.count_LE, part.device_LP)
            for part in self.latest()
            if part.count_LE is not None and part.device_LP is not None
        ]
        if not counts:
            return None
        experts, devices = zip(*counts, strict=True)
        return np.sum(experts, axis=0), np.sum(devices, axis=0)

    def quantile(self, name: str, q: float) -> float | None:
        """Returns a quantile of that minute's `first_token` or `between_tokens`."""
        found = [getattr(part, name) for part in self.latest()]
        if not found:
            return None
        total = latency.Durations(found[0].bounds)
        total.count_B = np.sum([durations.count_B for durations in found], axis=0)
        return total.quantile(q)

    def history(self, now: float) -> Iterator[FiveSeconds | int]:
        """Yields each part, or its index where nothing happened, up to the last over.

        It begins with the server, a quarter of an hour ago at most.
        """
        end = int(now // SECONDS)
        start = max(int(self._begun // SECONDS), end - KEPT)
        by_index = {part.index: part for part in self._parts}
        yield from (by_index.get(index, index) for index in range(start, end))

    def _close(self) -> None:
        """Measures balance as a part ends, and forgets counts that are too old."""
        if not self._parts:
            return
        last = self._parts[-1]
        counts = self.counts()
        if last.count_LE is not None and counts is not None:
            vio_L = max_violation_L(even_share(counts[0]))
            last.max_vio = float(np.median(vio_L)), float(vio_L.max())
        for part in self._parts:
            if part.index > last.index - WINDOW:
                break
            part.count_LE = part.device_LP = None
