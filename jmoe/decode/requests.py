"""What a decoder is asked for, and what it answers."""

import dataclasses
import math
from collections.abc import Sequence

from jmoe.config import ModelConfig, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are drawn, and where they end.

    The parameters are those of `jmoe.decode.sampling.Draws`. stop_ids: tokens that end
    it, and aren't part of it; stop_texts: texts that end it, of which the last token
    is part, and which need an engine that knows the tokenizer. logprobs: how many of
    the likeliest tokens to tell of each.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    logprobs: int = 0

    def __post_init__(self):
        checks.at_least(self, max_new_tokens=1, top_k=0, seed=0, logprobs=0)
        checks.at_most(self, seed=checks.MAX_SEED, top_k=2**31 - 1)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be at least 0, and finite."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be at least 0 and at most 1.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be above 0, and "
                "finite."
            )
        for field in ("stop_ids", "stop_texts"):
            value = getattr(self, field)
            if not isinstance(value, tuple):
                raise ValueError(f"{field}={value!r} must be a tuple.")
        if not all(self.stop_texts):
            raise ValueError("stop_texts must not hold an empty text.")

    def further(self, number: int) -> "Sampling":
        """Returns the same with a seed so many further; behind the last one is 0."""
        seed = (self.seed + number) % (checks.MAX_SEED + 1)
        return dataclasses.replace(self, seed=seed)


@dataclasses.dataclass
class Completion:
    """What became of a request.

    number: of the request, in the order they were given. tokens: the new ones, without
    one that ended it; logprobs: of each, in nats; top_logprobs: of each, the likeliest
    tokens and their log-probabilities. finish_reason: "stop", "length", "cancelled" or
    "error", which `error` explains; None: it goes on. times: seconds from when the
    request was submitted to each token. steps: in which drafts were tried; accepted: in
    how many of these the first, second, ... was right.
    """

    number: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    steps: int = 0
    accepted: list[int] = dataclasses.field(default_factory=list)


def check_prompt(
    cfg: ModelConfig, prompt: Sequence[int], max_new_tokens: int, max_length: int
) -> None:
    """Refuses what the model, or its cache, has no place for.

    Args:
      max_length: how many positions a sequence may have.

    Raises:
      ValueError: the prompt is empty, has a token outside of the vocabulary, or is too
        long with its new tokens.
    """
    if not len(prompt):
        raise ValueError("A prompt must not be empty.")
    wrong = [token for token in prompt if not 0 <= token < cfg.vocab_size]
    if wrong:
        raise ValueError(
            f"Token {wrong[0]} of a prompt lies outside of vocab_size={cfg.vocab_size}."
        )
    length = len(prompt) + max_new_tokens
    if length > max_length:
        raise ValueError(
            f"A prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} "
            f"make {length} positions; there are {max_length}."
        )
