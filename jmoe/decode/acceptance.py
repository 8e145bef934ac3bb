"""How often drafts were right, over completions that have ended."""

from collections.abc import Iterable
from typing import NamedTuple

from jmoe.decode.requests import Completion


class Acceptance(NamedTuple):
    """Steps that tried drafts, and in how many the first, second, ... was right.

    A draft counts as right only if those before it were.
    """

    steps: int
    accepted: tuple[int, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Fractions of the steps in which each draft was right."""
        return tuple(count / max(self.steps, 1) for count in self.accepted)

    @property
    def tokens_a_step(self) -> float:
        """How many tokens a step gives: one, and the drafts that are right."""
        return 1 + sum(self.rates)


def acceptance(completions: Iterable[Completion]) -> Acceptance:
    """Returns the sums over completions of one engine."""
    every = list(completions)
    columns = zip(*(completion.accepted for completion in every), strict=True)
    steps = sum(completion.steps for completion in every)
    return Acceptance(steps, tuple(map(sum, columns)))
