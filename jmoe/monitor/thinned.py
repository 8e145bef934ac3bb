"""The whole of a run's history in a bounded number of points.

When there are too many, every second one goes, and of those to come as many.
"""

from typing import Any

LIMIT = 400


class Thinned:
    """Keeps points by step, spread over all of a run, and always the last."""

    def __init__(self, limit: int = LIMIT):
        self._limit = limit
        self._every = 1  # of the points that come, how many make one that is kept
        self._come = 0
        self._kept: list[tuple[int, Any]] = []
        self._last: tuple[int, Any] | None = None

    def add(self, step: int, point: Any) -> None:
        """Takes a point; those of the same and later steps, from before, are gone."""
        self._kept = [kept for kept in self._kept if kept[0] < step]
        self._last = step, point
        if self._come % self._every == 0:
            self._kept.append(self._last)
        self._come += 1
        if len(self._kept) > self._limit:
            self._kept, self._every = self._kept[::2], self._every * 2

    def points(self) -> list[tuple[int, Any]]:
        """Returns step and point of those that are kept, in order of steps."""
        if self._last is None or (self._kept and self._kept[-1] == self._last):
            return list(self._kept)
        return [*self._kept, self._last]
