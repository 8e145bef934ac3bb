"""Histograms of durations, as Prometheus has them, and quantiles read off them.

Six bounds a decade; between two of them a quantile is interpolated.
"""

import bisect

import numpy as np

_DECADE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


def bounds(first_decade: int, last_decade: int) -> tuple[float, ...]:
    """Returns bounds in seconds, from 10**first_decade to 10**last_decade."""
    inner = (
        float(f"{digit}e{decade}")
        for decade in range(first_decade, last_decade)
        for digit in _DECADE
    )
    return (*inner, 10.0**last_decade)


STEP = bounds(-3, 1)
BETWEEN_TOKENS = bounds(-3, 1)
FIRST_TOKEN = bounds(-2, 2)


class Durations:
    """Counts durations between bounds.

    count_B: those up to each bound and above the one before; the last are above all.
    """

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.count_B = np.zeros(len(bounds) + 1, np.int64)
        self.total = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self.count_B[bisect.bisect_left(self.bounds, seconds)] += times
        self.total += seconds * times

    def quantile(self, q: float) -> float | None:
        """Returns what a share `q` of durations doesn't exceed; None if there are none.

        Between two bounds they are taken to lie evenly. What is above all bounds counts
        as the last one.
        """
        total = int(self.count_B.sum())
        if not total:
            return None
        at = int(np.searchsorted(self.count_B.cumsum(), q * total))
        if at == len(self.bounds):
            return self.bounds[-1]
        low = self.bounds[at - 1] if at else 0.0
        inside = int(self.count_B[at])
        part = (q * total - int(self.count_B[:at].sum())) / inside if inside else 0.0
        return low + (self.bounds[at] - low) * part

    def since(self, before: "Durations") -> "Durations":
        """Returns those that came after `before` was like this."""
        later = Durations(self.bounds)
        later.count_B = np.maximum(self.count_B - before.count_B, 0)
        return later


def seconds(value: float) -> str:
    """Returns a duration in words, such as "43 ms" and "1.2 s"."""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
