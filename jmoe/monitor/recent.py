"""What a server did in the last minutes, in pieces of five seconds.

A piece that nothing happened in isn't there. Counts of experts are kept for the last
minute's pieces alone: a big model's have 119 kB each.

Shapes: L MoE layers, E routed experts, P devices.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from jmoe.monitor import latency
from jmoe.monitor.snapshot import even_share, max_violation_L

SECONDS = 5  # of a piece
KEPT = 180  # pieces: fifteen minutes
WINDOW = 12  # pieces that loads and latencies are counted over: a minute
RATE = 2  # whole pieces that a rate is counted over, and what there is of one more


@dataclasses.dataclass
class Piece:
    """What happened in five seconds. index: their number since 1970."""

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
    """The latest pieces. One thread at a time may use it."""

    def __init__(self, now: float):
        self._begun = now
        self._pieces: collections.deque[Piece] = collections.deque()

    def piece(self, now: float) -> Piece:
        """Returns the piece of this moment, for what happens to be added."""
        index = int(now // SECONDS)
        if not self._pieces or self._pieces[-1].index < index:
            self._close()
            self._pieces.append(Piece(index))
            while self._pieces[0].index <= index - KEPT:
                self._pieces.popleft()
        return self._pieces[-1]  # a clock that was set back stays in the last one

    def rate(self, now: float, counted: Callable[[Piece], float]) -> float:
        """Returns what pieces count, a second, over the last ten to fifteen."""
        first = int(now // SECONDS) - RATE
        found = sum(counted(piece) for piece in self._pieces if piece.index >= first)
        since = max(self._begun, first * SECONDS)
        return found / max(now - since, 1.0)

    def latest(self) -> list[Piece]:
        """Returns the pieces of the minute that ends with the last one."""
        if not self._pieces:
            return []
        first = self._pieces[-1].index - WINDOW
        return [piece for piece in self._pieces if piece.index > first]

    def counts(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns choices [L, E] and [L, P] in that minute; None if there were none.

        An idle server keeps its last minute: pieces count, not the clock.
        """
        counts = [
            (piece.count_LE, piece.device_LP)
            for piece in self.latest()
            if piece.count_LE is not None and piece.device_LP is not None
        ]
        if not counts:
            return None
        experts, devices = zip(*counts, strict=True)
        return np.sum(experts, axis=0), np.sum(devices, axis=0)

    def quantile(self, name: str, q: float) -> float | None:
        """Returns a quantile of that minute's `first_token` or `between_tokens`."""
        found = [getattr(piece, name) for piece in self.latest()]
        if not found:
            return None
        total = latency.Durations(found[0].bounds)
        total.count_B = np.sum([durations.count_B for durations in found], axis=0)
        return total.quantile(q)

    def history(self, now: float) -> Iterator[Piece | int]:
        """Yields each piece, or its index where nothing happened, up to the last over.

        It begins with the server, a quarter of an hour ago at most.
        """
        end = int(now // SECONDS)
        start = max(int(self._begun // SECONDS), end - KEPT)
        by_index = {piece.index: piece for piece in self._pieces}
        yield from (by_index.get(index, index) for index in range(start, end))

    def _close(self) -> None:
        """Measures balance as a piece ends, and forgets counts that are too old."""
        if not self._pieces:
            return
        last = self._pieces[-1]
        counts = self.counts()
        if last.count_LE is not None and counts is not None:
            vio_L = max_violation_L(even_share(counts[0]))
            last.max_vio = float(np.median(vio_L)), float(vio_L.max())
        for piece in self._pieces:
            if piece.index > last.index - WINDOW:
                break
            piece.count_LE = piece.device_LP = None
