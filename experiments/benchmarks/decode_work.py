"""What all sides of the decoding benchmark complete. Shapes: B sequence, T position."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jmoe.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Prompts of `prompt` tokens and `new` ones for each, so many at a time."""

    model: ModelConfig
    prompt: int = 128
    new: int = 128
    batches: tuple[int, ...] = (1, 8, 32)

    @property
    def length(self) -> int:
        return self.prompt + self.new

    def prompts(self, batch: int) -> np.ndarray:
        """Returns the same random int64 [B, T] for everyone; fewer are the first."""
        return random_tokens(self.model, max(self.batches), self.prompt)[:batch]


class Request(NamedTuple):
    """A prompt, and how many tokens are to follow it."""

    prompt: list[int]
    new: int


def random_tokens(cfg: ModelConfig, *shape: int) -> np.ndarray:
    """Returns int64 tokens, always the same."""
    return np.random.default_rng(0).integers(cfg.vocab_size, size=shape)


def mixed_requests(cfg: ModelConfig, count: int, longest: int) -> list[Request]:
    """Returns requests with prompts and completions of up to `longest` tokens each.

    Their lengths are drawn evenly on a logarithmic scale, from an eighth of that.
    """
    rng = np.random.default_rng(0)

    def length() -> int:
        return round(longest * 8 ** -rng.random())

    return [
        Request(rng.integers(cfg.vocab_size, size=length()).tolist(), length())
        for _ in range(count)
    ]
