"""How fast an engine decodes: tokens a second, and how long each of them is waited for.

A measurement completes prompts, one by one or many at a time, and looks at when tokens
came. The wait for a request's first token has the reading of its prompt in it, between
the steps of others. A wait between tokens is none where a step brings several, as it
does when drafts are accepted: the median may then be 0.
"""

import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jmoe.config import ModelConfig
from jmoe.data.tokenizer import Tokenizer
from jmoe.decode.acceptance import acceptance
from jmoe.decode.engine import Engine
from jmoe.decode.limits import Limits, few_parts
from jmoe.decode.requests import Completion, Sampling
from jmoe.evals.records import read_records

CHUNKS = (128,)  # of a prompt
PROMPT_FIELDS = ("prompt", "text", "statement")  # the first that a record has


class Quantiles(NamedTuple):
    """Seconds."""

    median: float
    p99: float


class Speed(NamedTuple):
    """first and between: how long a request's first and each further token took.

    acceptance: of the steps, those in which the first, the second, ... draft was right.
    tokens_a_step: of one request, on average.
    """

    requests: int
    tokens: int
    seconds: float
    first: Quantiles
    between: Quantiles
    acceptance: tuple[float, ...]
    tokens_a_step: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def figures(self) -> dict[str, Any]:
        """Returns all of it, as JSON has it."""
        return {
            "tokens_per_second": self.tokens_per_second,
            **self._asdict(),
            "first": self.first._asdict(),
            "between": self.between._asdict(),
        }


def read_prompts(
    path: pathlib.Path, tokenizer: Tokenizer, most: int
) -> list[list[int]]:
    """Returns each record's text as tokens; of a longer one, the first `most`.

    Raises:
      ValueError: a record has none of `PROMPT_FIELDS`, or as `read_records` does.
    """
    if most < 1:
        raise ValueError(f"A prompt has room for {most} tokens, beside the new ones.")
    prompts = []
    for number, record in enumerate(read_records(path, ()), 1):
        texts = [record[name] for name in PROMPT_FIELDS if name in record]
        if not texts or not isinstance(texts[0], str) or not texts[0]:
            known = ", ".join(PROMPT_FIELDS)
            raise ValueError(f"{path}, record {number}: no text in any of {known}.")
        prompts.append(tokenizer.prompt(texts[0])[:most])
    return prompts


def make_engine(
    cfg: ModelConfig,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    at_a_time: int,
    drafts: int = 0,
) -> Engine:
    """Returns an engine for these prompts, compiled, that lets none wait for a slot."""
    rows = tuple(sorted({1, at_a_time}))
    length = max(map(len, prompts)) + new_tokens
    limits = Limits(
        rows=rows,
        prompts=few_parts(at_a_time),
        chunks=CHUNKS,
        max_length=length,
        drafts=drafts,
        queue=1,
    )
    return Engine(cfg, variables, limits)


def measure(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    one_by_one: bool = False,
) -> Speed:
    """Completes all prompts and returns how fast that was.

    Args:
      one_by_one: a prompt begins when the one before it has ended.

    Raises:
      ValueError: there are no prompts, or one can't be gone on with.
    """
    if not prompts:
        raise ValueError("There are no prompts to decode.")
    requests = [(prompt, sampling) for prompt in prompts]
    start = time.perf_counter()
    if one_by_one:
        done = [each for request in requests for each in engine.complete([request])]
    else:
        done = list(engine.complete(requests))
    return summarize(done, time.perf_counter() - start)


def summarize(done: Sequence[Completion], seconds: float) -> Speed:
    """Returns what requests that took so long together say of the speed.

    Raises:
      ValueError: one has an error, or no token came.
    """
    for each in done:
        if each.error:
            raise ValueError(f"Prompt {each.number}: {each.error}")
    done = [each for each in done if each.tokens]
    if not done:
        raise ValueError("No token came of any prompt.")
    drafted = acceptance(done)
    between = np.concatenate([np.diff(each.times) for each in done])
    return Speed(
        requests=len(done),
        tokens=sum(len(each.tokens) for each in done),
        seconds=seconds,
        first=_quantiles([each.times[0] for each in done]),
        between=_quantiles(between),
        acceptance=drafted.rates,
        tokens_a_step=drafted.tokens_a_step,
    )


def _quantiles(seconds: Sequence[float] | np.ndarray) -> Quantiles:
    if not len(seconds):  # where each request had one token
        return Quantiles(0.0, 0.0)
    return Quantiles(*np.quantile(seconds, [0.5, 0.99]).tolist())
