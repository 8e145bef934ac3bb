"""What an evaluation asks of a model: texts to go on from, answered in any order.

`Complete` is that function. `LocalModel.complete` is one of a trained model here,
`jmoe.evals.endpoint` has one of a server elsewhere.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jmoe.config import ModelConfig, checks
from jmoe.data.tokenizer import Tokenizer
from jmoe.decode.generate import generate

BATCH = 32  # prompts that are completed at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a text is gone on with; temperature 0 takes the most likely token.

    stop: texts at whose first occurrence the answer ends, without them.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 8192  # DeepSeek-V3's evaluations (2412.19437, section 5.3.1)
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        checks.at_least(self, temperature=0.0, max_new_tokens=1, seed=0)
        checks.above_zero(self, "top_p")
        checks.at_most(self, top_p=1.0, seed=checks.MAX_SEED)
        if "" in self.stop:
            raise ValueError(f"stop={self.stop!r} must hold no empty text.")


class Prompted(NamedTuple):
    """A text to go on from, and how. `LocalModel` takes token ids as well."""

    text: str | Sequence[int]
    decoding: Decoding


class Reply(NamedTuple):
    """What came after the prompt of this number, counted from 0.

    finish_reason: "stop" where the model ended, "length" where it had to, "error" with
    `error` where this prompt can't be gone on with.
    """

    number: int
    text: str
    finish_reason: str
    error: str = ""


Complete = Callable[[Sequence[Prompted]], Iterator[Reply]]


class LocalModel:
    """A model in this process, with its tokenizer."""

    def __init__(self, cfg: ModelConfig, variables: Any, tokenizer: Tokenizer):
        self.cfg, self.variables, self.tokenizer = cfg, variables, tokenizer

    def complete(self, prompts: Sequence[Prompted]) -> Iterator[Reply]:
        """Yields replies; a prompt that leaves no room for a token has an error."""
        most = self.cfg.max_positions
        waiting = []
        for number, (text, decoding) in enumerate(prompts):
            ids = self.tokenizer.prompt(text) if isinstance(text, str) else list(text)
            room = most - len(ids)
            if room < 1:
                error = f"The prompt has {len(ids)} tokens; max_positions={most}."
                yield Reply(number, "", "error", error)
                continue
            new = min(decoding.max_new_tokens, room)
            waiting.append(
                (dataclasses.replace(decoding, max_new_tokens=new), ids, number)
            )
        yield from self._in_batches(waiting)

    def _in_batches(self, waiting: list[tuple[Decoding, list[int], int]]):
        def alike(asked):
            return asked[0].temperature, asked[0].top_p, len(asked[1])

        waiting.sort(key=alike)
        while waiting:
            first, *_ = waiting
            batch = [w for w in waiting[:BATCH] if alike(w)[:2] == alike(first)[:2]]
            del waiting[: len(batch)]
            yield from self._batch(batch)

    def _batch(self, batch: list[tuple[Decoding, list[int], int]]) -> Iterator[Reply]:
        longest = max(len(ids) for _, ids, _ in batch)
        most = max(decoding.max_new_tokens for decoding, _, _ in batch)
        first = batch[0][0]
        found = generate(
            self.cfg,
            self.variables,
            [ids for _, ids, _ in batch],
            max_new_tokens=min(most, self.cfg.max_positions - longest),
            temperature=first.temperature,
            top_p=first.top_p,
            seed=first.seed,
            stop_ids=self.tokenizer.stop_ids,
        )
        for (decoding, _, number), tokens in zip(batch, found, strict=True):
            is_whole = len(tokens) < min(most, self.cfg.max_positions - longest)
            text = self.tokenizer.decode(tokens[: decoding.max_new_tokens])
            text, is_cut = cut(text, decoding.stop)
            reason = "stop" if is_whole or is_cut else "length"
            yield Reply(number, text, reason)


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Returns the text up to the first of these in it, and whether there is one."""
    ends = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(ends, default=len(text))], bool(ends)
