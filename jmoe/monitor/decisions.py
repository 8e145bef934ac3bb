"""What was decided while a run or a server went on, for people to read.

Plain words: whoever decides has a richer record of its own.
"""

import collections
import threading
from typing import NamedTuple

_KEPT = 100


class Decision(NamedTuple):
    """One decision. time: Unix, in seconds; reason: what was measured."""

    time: float
    kind: str  # such as "placement"
    reason: str
    change: str  # what is different from now on


class Decisions:
    """Keeps the latest decisions, and how many there were of each kind.

    Any thread may add one while others read.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._latest: collections.deque[Decision] = collections.deque(maxlen=_KEPT)
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, decision: Decision) -> None:
        with self._lock:
            self._latest.append(decision)
            self._counts[decision.kind] += 1

    def latest(self) -> tuple[Decision, ...]:
        """Returns the decisions that are kept, the oldest first."""
        with self._lock:
            return tuple(self._latest)

    def counts(self) -> dict[str, int]:
        """Returns how many there were, those no longer kept among them, by kind."""
        with self._lock:
            return dict(self._counts)
