"""Where to cut a row of layers into stages."""

import functools
import itertools
import math
from collections.abc import Sequence

Bounds = tuple[int, ...]  # the first layer of each stage, and where the last one ends


def partition(
    costs: Sequence[float], num_stages: int, *, first: float = 0, last: float = 0
) -> Bounds:
    """Cuts layers so that the dearest stage costs least, and the others are even.

    Args:
      costs: of each layer, in any unit.
      first, last: what the first and the last stage have to do besides.

    Raises:
      ValueError: there are more stages than layers.
    """
    if num_stages > len(costs):
        raise ValueError(
            f"{num_stages} stages are more than the {len(costs)} layers to cut into "
            f"them; there can be 1 to {len(costs)}."
        )
    before = [0.0, *itertools.accumulate(costs)]

    def cost(stage: int, begin: int, end: int) -> float:
        extra = first * (stage == 0) + last * (stage == num_stages - 1)
        return before[end] - before[begin] + extra

    def ends(stage: int, begin: int) -> range:
        """Returns where a stage may end.

        Each later stage has a layer, and the last one has all that are left.
        """
        later = num_stages - 1 - stage
        most = len(costs) - later
        return range(begin + 1 if later else most, most + 1)

    @functools.cache
    def dearest(stage: int, begin: int) -> float:
        """Returns the cost of the dearest stage from this one on, where cut best."""
        if stage == num_stages:
            return 0.0
        return min(
            max(cost(stage, begin, end), dearest(stage + 1, end))
            for end in ends(stage, begin)
        )

    limit = dearest(0, 0) * (1 + 1e-9)  # sums are rounded

    @functools.cache
    def evenest(stage: int, begin: int) -> tuple[float, Bounds]:
        """Returns the least sum of squares in the limit, and the ends that have it."""
        if stage == num_stages:
            return 0.0, ()
        options = []
        for end in ends(stage, begin):
            own = cost(stage, begin, end)
            rest, bounds = evenest(stage + 1, end)
            options.append(
                (own**2 + rest if own <= limit else math.inf, (end, *bounds))
            )
        return min(options)

    return (0, *evenest(0, 0)[1])
