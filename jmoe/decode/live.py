"""A request while it is being decoded, and a step's arrays of such requests.

Arrays are NumPy's; there is one section for each of `parts` devices that have sequences
of their own, and each section is as long as the program's size says.

Shapes: B sequence being decoded, Q token of one, A sequence being read, C token of its
prompt, M page of a sequence.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jmoe.decode.batch import DecodeRows, PrefillChunks
from jmoe.decode.limits import Limits, StepSize
from jmoe.decode.requests import Completion, Sampling
from jmoe.decode.sampling import Draws
from jmoe.decode.text import TextStream

NOWHERE = 2**30  # the slot, and the pages, of a row that isn't there


@dataclasses.dataclass
class Live:
    """A request: what was asked, what became of it so far, and where it is.

    part: whose device's; slot: its place there. pages: of the cache. read: how many of
    the prompt's tokens are cached. tail: the token drawn last, and drafts. stream: what
    looks for texts that end it; None: there are none.
    """

    prompt: Sequence[int]
    sampling: Sampling
    completion: Completion
    submitted: float
    part: int = 0
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    read: int = 0
    tail: list[int] = dataclasses.field(default_factory=list)
    stream: TextStream | None = None

    @property
    def length(self) -> int:
        """How many positions it may have."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def is_read(self) -> bool:
        return self.read == len(self.prompt)

    @property
    def position(self) -> int:
        """Where the token drawn last is."""
        return len(self.prompt) + len(self.completion.tokens) - 1


class PromptChunk(NamedTuple):
    """A part of a request's prompt: `count` tokens from `start` on."""

    live: Live
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def is_last(self) -> bool:
        return self.end == len(self.live.prompt)


_DRAWS = Draws(
    np.float32(0),
    np.int32(0),
    np.float32(1),
    np.float32(0),
    np.float32(1),
    np.uint32(0),
)  # of none: greedy


def make_rows(limits: Limits, parts: Sequence[Sequence[Live]], size: int) -> DecodeRows:
    """Returns the sequences of each part as rows, `size` a part."""
    width, pages = 1 + limits.drafts, limits.pages_of_one
    count = len(parts) * size
    rows = DecodeRows(
        slot_B=np.full(count, NOWHERE, np.int32),
        token_BQ=np.zeros((count, width), np.int32),
        position_B=np.full(count, -1, np.int32),
        end_B=np.zeros(count, np.int32),
        table_BM=np.full((count, pages), NOWHERE, np.int32),
        draws=_no_draws(count),
    )
    for part, lives in enumerate(parts):
        for i, live in enumerate(lives, start=part * size):
            rows.slot_B[i] = live.slot
            rows.token_BQ[i] = live.tail
            rows.position_B[i] = live.position
            rows.end_B[i] = live.length
            rows.table_BM[i, : len(live.pages)] = live.pages
            _set_draws(rows.draws, i, live.sampling)
    return rows


def make_chunks(
    limits: Limits, parts: Sequence[Sequence[PromptChunk]], size: StepSize
) -> PrefillChunks:
    """Returns the chunks of each part, as many a part, and as long, as the size has."""
    count = len(parts) * size.prompts
    chunks = PrefillChunks(
        slot_A=np.full(count, NOWHERE, np.int32),
        token_AC=np.zeros((count, size.chunk), np.int32),
        start_A=np.zeros(count, np.int32),
        count_A=np.zeros(count, np.int32),
        next_A=np.zeros(count, np.int32),
        end_A=np.zeros(count, np.int32),
        table_AM=np.full((count, limits.pages_of_one), NOWHERE, np.int32),
        draws=_no_draws(count),
    )
    for part, read in enumerate(parts):
        for i, chunk in enumerate(read, start=part * size.prompts):
            live, end = chunk.live, chunk.end
            chunks.slot_A[i] = live.slot
            chunks.token_AC[i, : chunk.count] = live.prompt[chunk.start : end]
            chunks.start_A[i] = chunk.start
            chunks.count_A[i] = chunk.count
            chunks.next_A[i] = -1 if chunk.is_last else live.prompt[end]
            chunks.end_A[i] = live.length
            chunks.table_AM[i, : len(live.pages)] = live.pages
            _set_draws(chunks.draws, i, live.sampling)
    return chunks


def make_nobody(
    limits: Limits, parts: int, size: StepSize
) -> tuple[DecodeRows, PrefillChunks]:
    """Returns the arrays of a step of this size in which no request takes part."""
    nobody = [[] for _ in range(parts)]
    rows = make_rows(limits, nobody, size.rows)
    return rows, make_chunks(limits, nobody, size)


def _no_draws(count: int) -> Draws:
    return Draws(*(np.full(count, value) for value in _DRAWS))


def _set_draws(draws: Draws, row: int, sampling: Sampling) -> None:
    draws.temperature[row] = sampling.temperature
    draws.top_k[row] = sampling.top_k
    draws.top_p[row] = sampling.top_p
    draws.min_p[row] = sampling.min_p
    draws.penalty[row] = sampling.repetition_penalty
    draws.seed[row] = sampling.seed
