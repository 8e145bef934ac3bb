"""DualPipe, and the half of it that needs no second copy of the parameters.

In DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1 and figure 5) microbatches
enter at both ends. A rank that is d ranks away from its end hosts stage d of the
microbatches that enter there, here called the near ones (0), and the stage as far from
the other end of those that enter at the other, the far ones (1). Both halves of the
ranks do the same, mirrored.

So one half is enough, if its innermost rank hands what has passed through to itself
instead of to the other half: then each microbatch travels in and out again, through
twice as many stages as there are ranks. That is DualPipeV, the "cut-in-half" schedule.

With n ranks in a half, both have the published bubble, (n - 1) (F&B + B - 3 W) where B
is the whole backward pass, exactly if F takes as long as the backward pass without W,
and W no longer. If F takes longer than that, it is (n - 1) (F&B + F - 2 W).
"""

import collections
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from jmoe.parallel.schedule.tasks import Pass, Schedule, Task


class Stream(NamedTuple):
    """Microbatches that pass through one of a rank's two stages."""

    stage: int
    direction: int
    microbatches: range


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Sends microbatches from both ends through two copies of the stages.

    Raises:
      ValueError: ranks or microbatches are odd, or microbatches fewer than 2 a rank.
    """
    if num_ranks % 2:
        raise ValueError(
            f"dualpipe: num_ranks={num_ranks} must be even; dualpipe_v takes any."
        )
    if num_microbatches % 2 or num_microbatches < 2 * num_ranks:
        raise ValueError(
            f"dualpipe: num_microbatches={num_microbatches} must be even and at least "
            f"{2 * num_ranks}, 2 for each of the {num_ranks} ranks."
        )
    half, each = num_ranks // 2, num_microbatches // 2

    def order(rank: int) -> tuple[Task, ...]:
        down = Stream(rank, 0, range(each))
        up = Stream(num_ranks - 1 - rank, 1, range(each, num_microbatches))
        near, far = (down, up) if rank < half else (up, down)
        return tuple(_tasks(_phases(near.stage, half, each), near, far))

    ranks = tuple(range(num_ranks))
    return Schedule(
        name="dualpipe",
        num_microbatches=num_microbatches,
        hosts=(ranks, ranks[::-1]),
        tasks=tuple(map(order, ranks)),
        max_activations=num_ranks + 1,
    )


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Runs half of DualPipe: through the ranks and back, one copy of 2 stages a rank.

    Raises:
      ValueError: there are fewer than 2 microbatches a rank.
    """
    if num_microbatches < 2 * num_ranks:
        raise ValueError(
            f"dualpipe_v: num_microbatches={num_microbatches} must be at least "
            f"{2 * num_ranks}, 2 for each of the {num_ranks} ranks."
        )

    def order(rank: int) -> tuple[Task, ...]:
        near = Stream(rank, 0, range(num_microbatches))
        far = Stream(2 * num_ranks - 1 - rank, 0, range(num_microbatches))
        return tuple(_tasks(_phases(rank, num_ranks, num_microbatches), near, far))

    ranks = tuple(range(num_ranks))
    return Schedule(
        name="dualpipe_v",
        num_microbatches=num_microbatches,
        hosts=(ranks + ranks[::-1],),
        tasks=tuple(map(order, ranks)),
        max_activations=2 * num_ranks + 1,
    )


def _phases(depth: int, half: int, count: int) -> Iterator[str]:
    """Yields the kinds of a rank's tasks, each with its stream: 0 is near, 1 is far.

    Args:
      depth: how many ranks there are between this one and its end.
      half: ranks from the end to the middle.
      count: microbatches of each stream, at least 2 * half.
    """
    outer = depth + 1  # ranks from the end to here
    inner = half - outer  # ranks from here to the middle
    yield from ["F0"] * 2 * inner
    yield from ["F0", "F1"] * outer
    # The far microbatches' way back begins. Others wait for B only, so W goes after it.
    yield from ["B1", "W", "F1"] * inner
    steady = ["F0&BW1", "F1&BW0"] * (count - 2 * half + outer)
    if not inner:
        # Both halves wait for what the middle does here, one for F and one for B.
        steady[:1] = ["F0", "BW1"]
    yield from steady
    yield from ["BW1", "F1&BW0"] * inner
    # No forward passes are left to fill in; from half of these on, W is kept for later.
    backward = ["1", "0"] * outer
    yield from ("BW" + stream for stream in backward[:outer])
    yield from ("B" + stream for stream in backward[outer:])
    yield from ["W", "B0"] * inner
    yield from ["W"] * outer


def _tasks(words: Iterator[str], near: Stream, far: Stream) -> Iterator[Task]:
    """Fills in microbatches, which each stream takes in order; W takes the oldest B."""
    counts = collections.defaultdict(itertools.count)
    deferred: collections.deque[Pass] = collections.deque()
    for word in words:
        if word == "W":
            yield Task((deferred.popleft()._replace(kind="W"),))
            continue
        passes = []
        for kinds, index in re.findall(r"(F|BW|B)([01])", word):
            stream = (near, far)[int(index)]
            microbatch = stream.microbatches[next(counts[kinds[0], index])]
            passes += [
                Pass(kind, stream.stage, microbatch, stream.direction) for kind in kinds
            ]
        if passes[-1].kind == "B":
            deferred.append(passes[-1])
        yield Task(tuple(passes))
