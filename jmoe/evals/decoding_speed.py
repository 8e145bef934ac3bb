"""How fast an engine decodes: tokens a second, and how long each of them is waited for.

A measurement completes prompts, so many of them at a time, and looks at when tokens
came. Waiting for a request's first token includes its prompt; a wait between tokens is
none where a step brings several, as drafts do that were accepted.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

PROMPT_FIELDS = ("prompt", "text", "statement")  # the first that a record has


class Found(Protocol):
    """What an engine says of a completed request.

    first_token_s and token_times: seconds from the request to its first, and to each
    of its tokens. drafted and accepted: how many tokens were proposed, and taken.
    """

    tokens: Sequence[int]
    first_token_s: float
    token_times: Sequence[float]
    drafted: int
    accepted: int


# Completes prompts, as many at a time as it has room for.
Run = Callable[[Sequence[Sequence[int]]], Iterable[Found]]


class Quantiles(NamedTuple):
    """Seconds."""

    median: float
    p99: float


class Speed(NamedTuple):
    """acceptance: share of drafts that were taken, or None where none was drafted.

    tokens_a_step: of one request, on average. first and between: how long a request's
    first token, and each further one, was waited for.
    """

    requests: int
    tokens: int
    seconds: float
    first: Quantiles
    between: Quantiles
    acceptance: float | None
    tokens_a_step: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def one_by_one(run: Run) -> Run:
    """Returns what completes each prompt before it begins the next."""

    def alone(prompts: Sequence[Sequence[int]]) -> Iterator[Found]:
        for prompt in prompts:
            yield from run([prompt])

    return alone


def measure(run: Run, prompts: Sequence[Sequence[int]]) -> Speed:
    """Completes all prompts and returns how fast that was.

    Raises:
      ValueError: there are no prompts, or no token came of them.
    """
    if not prompts:
        raise ValueError("There are no prompts to decode.")
    start = time.perf_counter()
    found = list(run(prompts))
    return summarize(found, time.perf_counter() - start)


def summarize(found: Sequence[Found], seconds: float) -> Speed:
    """Returns what requests that took so long together say of the speed."""
    found = [each for each in found if len(each.tokens)]
    if not found:
        raise ValueError("No prompt was gone on with: no token came.")
    tokens = sum(len(each.tokens) for each in found)
    drafted = sum(each.drafted for each in found)
    accepted = sum(each.accepted for each in found)
    between = np.concatenate([np.diff(each.token_times) for each in found])
    return Speed(
        requests=len(found),
        tokens=tokens,
        seconds=seconds,
        first=_quantiles([each.first_token_s for each in found]),
        between=_quantiles(between),
        acceptance=accepted / drafted if drafted else None,
        tokens_a_step=tokens / (tokens - accepted),
    )


def _quantiles(seconds: Iterable[float]) -> Quantiles:
    values = np.fromiter(seconds, np.float64)
    if not len(values):  # of requests that had one token each
        return Quantiles(0.0, 0.0)
    return Quantiles(*np.quantile(values, [0.5, 0.99]).tolist())
