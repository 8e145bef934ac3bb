"""What an evaluation asks of a model: texts to go on from, answered in any order.

`Complete` is that function. `LocalModel.complete` is one of a trained model here, by
`jmoe.decode.engine`; `jmoe.evals.endpoint` has one of a server elsewhere.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jmoe.config import ModelConfig
from jmoe.data.tokenizer import Tokenizer
from jmoe.decode.engine import Engine
from jmoe.decode.limits import Limits
from jmoe.decode.requests import Sampling, check_prompt
from jmoe.train import compiled

ROWS = (8, 32)  # that are decoded at once
CHUNKS = (128,)
LENGTH_STEP = 256  # of the longest sequence, so that an engine serves again


class Prompted(NamedTuple):
    """A text to go on from, and how. `LocalModel` takes token ids as well."""

    text: str | Sequence[int]
    sampling: Sampling


class Reply(NamedTuple):
    """What came after the prompt of this number, counted from 0.

    finish_reason: "stop" where the model or a stop text ended it, "length" where it had
    to, "error" with `error` where this prompt can't be gone on with.
    """

    number: int
    text: str
    finish_reason: str
    error: str = ""


Complete = Callable[[Sequence[Prompted]], Iterator[Reply]]


class LocalModel:
    """A model in this process, with its tokenizer.

    Args:
      variables: {"params": ..., "router_state": ...}.
      drafts: how many tokens an MTP module foretells in a step; changes no token.
    """

    def __init__(
        self, cfg: ModelConfig, variables: Any, tokenizer: Tokenizer, drafts: int = 0
    ):
        self.cfg, self.variables, self.tokenizer = cfg, variables, tokenizer
        self._drafts = drafts
        self._engine: Engine | None = None

    def complete(self, prompts: Sequence[Prompted]) -> Iterator[Reply]:
        """Yields replies. Each is as long as the model has positions for, at most.

        A prompt that leaves no room for a token has an error.
        """
        asked, numbers = [], []
        for number, prompt in enumerate(prompts):
            ids, sampling = self._request(*prompt)
            most = self.cfg.max_positions
            try:
                check_prompt(self.cfg, ids, sampling.max_new_tokens, most)
            except ValueError as error:
                yield Reply(number, "", "error", str(error))
            else:
                asked.append((ids, sampling))
                numbers.append(number)
        if not asked:
            return
        length = max(len(ids) + sampling.max_new_tokens for ids, sampling in asked)
        for done in self._engine_for(len(asked), length).complete(asked):
            text = self.tokenizer.decode(done.tokens)
            text = cut(text, asked[done.number][1].stop_texts)
            reason = done.finish_reason or "length"
            yield Reply(numbers[done.number], text, reason, done.error or "")

    def _request(
        self, text: str | Sequence[int], sampling: Sampling
    ) -> tuple[list[int], Sampling]:
        ids = self.tokenizer.prompt(text) if isinstance(text, str) else list(text)
        room = max(1, self.cfg.max_positions - len(ids))
        stops = {*sampling.stop_ids, *self.tokenizer.stop_ids}
        return ids, dataclasses.replace(
            sampling,
            max_new_tokens=min(sampling.max_new_tokens, room),
            stop_ids=tuple(sorted(stops)),
        )

    def _engine_for(self, count: int, length: int) -> Engine:
        """Returns the last engine if it is as large as is needed, or a new one."""
        length = -(-length // LENGTH_STEP) * LENGTH_STEP
        limits = Limits(
            rows=ROWS[: 1 + (count > ROWS[0])],
            chunks=CHUNKS,
            max_length=min(length, self.cfg.max_positions),
            drafts=self._drafts,
        )
        last = self._engine
        if last is None or last.limits != limits:
            compiled.make_room()
            self._engine = None  # its cache is freed before there is another
            text = self.tokenizer.decode
            self._engine = last = Engine(self.cfg, self.variables, limits, text)
        return last


def cut(text: str, stops: Sequence[str]) -> str:
    """Returns the text up to the first of these in it."""
    ends = [place for place in map(text.find, stops) if place >= 0]
    return text[: min(ends, default=len(text))]
