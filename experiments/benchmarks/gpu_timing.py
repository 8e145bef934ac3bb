"""How the GPU's systems are timed and what is told of each; neither JAX nor torch."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

ROUND_SECONDS = 0.02  # what one round enqueues, about; results held meanwhile fit, too
MOST_PASSES = 200
WRONG = 1.0  # the error of a result that isn't there, or isn't finite


class Contender(NamedTuple):
    """One system's way to do one operation of a case.

    is_checked: its result must be right; others' is theirs to answer for.
    """

    case: str
    operation: str
    system: str
    is_checked: bool = False

    def __str__(self) -> str:
        return f"{self.case}: {self.operation}, {self.system}"


class Measured(NamedTuple):
    """What a contender took, and whether its result is right.

    seconds: of one call, for each round.
    error: of its result against the reference's, where one was asked for.
    tolerance: of that error.
    """

    seconds: list[float]
    error: float | None = None
    tolerance: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def is_right(self) -> bool:
        if self.error is None or self.tolerance is None:
            return True
        return self.error <= self.tolerance


class Failed(NamedTuple):
    """Why a contender has no result."""

    reason: str


Outcome = Measured | Failed


class Clock:
    """Counts down the seconds that something has."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def time_calls(
    enqueue: Callable[[], Any],
    wait: Callable[[Any], Any],
    rounds: int,
    *,
    calls: int = 1,
) -> list[float]:
    """Seconds of one call, for each round.

    A round enqueues passes, and waits once: what the host does for the next pass
    happens while the GPU has work.

    Args:
      enqueue: makes the GPU do a pass; returns before it is done.
      wait: until what `enqueue` returned is there.
      calls: how many there are in a pass.
    """
    wait(enqueue())
    passes = math.ceil(ROUND_SECONDS / _elapsed(enqueue, wait, 1))
    passes = min(passes, MOST_PASSES)
    return [_elapsed(enqueue, wait, passes) / passes / calls for _ in range(rounds)]


def _elapsed(
    enqueue: Callable[[], Any], wait: Callable[[Any], Any], passes: int
) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(passes):
        result = enqueue()
    wait(result)
    return time.perf_counter() - start


def first_line(error: BaseException) -> str:
    """An exception as a reason."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
