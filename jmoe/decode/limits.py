"""How much a decoder holds at a time, and in which sizes it is compiled."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from jmoe.config import ModelConfig, checks
from jmoe.config.model import ROUTERS


class StepSize(NamedTuple):
    """A compiled size of a step; where no prompts are read, both of theirs are 0.

    rows: sequences being decoded. prompts: parts of prompts; chunk: tokens of each.
    """

    rows: int
    prompts: int = 0
    chunk: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of a decoder's programs and of its cache.

    On a mesh they are of each device that has sequences of its own, and with a pipeline
    of each of the sets that take turns (`jmoe.decode.on_mesh`).

    rows: how many sequences are decoded at once, in ascending order; each is compiled,
      and of each step the smallest that suffices is taken. The last is how many there
      may be at a time.
    prompts: how many parts of prompts are read at once, likewise: of one prompt or of
      several. Steps that read are compiled for all of `rows` but the first, if there
      are others: beside so many tokens, a few rows that aren't there cost little.
    chunks: how many tokens each of these parts has, likewise.
    prompt_tokens: how many tokens of prompts others wait for in a step, at most: larger
      products of `prompts` and `chunks` aren't compiled. None: all are.
    max_length: positions of a sequence, its prompt and its new tokens.
    page_size: positions of a page. num_pages: of the cache; None: enough for as many
      sequences as there may be, at their longest.
    drafts: how many tokens a step tries to foretell.
    top_logprobs: how many a request may ask for.
    queue: how many requests may wait.
    """

    rows: tuple[int, ...] = (1, 8, 32)
    prompts: tuple[int, ...] = (1, 4)
    chunks: tuple[int, ...] = (64, 256)
    prompt_tokens: int | None = None
    max_length: int = 4096
    page_size: int = 64
    num_pages: int | None = None
    drafts: int = 0
    top_logprobs: int = 0
    queue: int = 1024

    def __post_init__(self):
        checks.at_least(
            self, max_length=2, page_size=1, drafts=0, top_logprobs=0, queue=1
        )
        for name in ("rows", "prompts", "chunks"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(
                    f"{name}={sizes} must be numbers above 0 in ascending order."
                )
        least = self.prompts[0] * self.chunks[-1]
        if self.prompt_tokens is not None and self.prompt_tokens < least:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} must be at least {least}, so that "
                f"prompts={self.prompts[0]} part of chunks={self.chunks[-1]} tokens "
                "can be read."
            )
        if self.num_pages is not None and self.num_pages < self.pages_of_one:
            raise ValueError(
                f"num_pages={self.num_pages} must be at least {self.pages_of_one}, so "
                f"that one sequence of max_length={self.max_length} has room."
            )

    @property
    def slots(self) -> int:
        """How many sequences there may be at a time."""
        return self.rows[-1]

    @property
    def sizes(self) -> tuple[StepSize, ...]:
        """All sizes of steps."""
        beside = itertools.product(self.readings, self._rows_beside)
        found = [StepSize(rows, *reading) for reading, rows in beside]
        return *map(StepSize, self.rows), *found

    def size(self, rows: int, prompts: int, chunk: int) -> StepSize:
        """Returns the smallest size that has room for so many."""
        if not prompts:
            return StepSize(_smallest(self.rows, rows))
        return StepSize(
            _smallest(self._rows_beside, rows),
            _smallest(self.prompts, prompts),
            _smallest(self.chunks, chunk),
        )

    @property
    def readings(self) -> tuple[tuple[int, int], ...]:
        """How many parts of prompts a step may read, and of how many tokens each."""
        most = self.prompt_tokens or self.prompts[-1] * self.chunks[-1]
        each = itertools.product(self.prompts, self.chunks)
        return tuple(pair for pair in each if pair[0] * pair[1] <= most)

    @property
    def _rows_beside(self) -> tuple[int, ...]:
        """Numbers of rows for which steps that read prompts are compiled."""
        return self.rows[1:] or self.rows

    @property
    def pages_of_one(self) -> int:
        """How many pages the longest sequence has."""
        return -(-self.max_length // self.page_size)

    @property
    def pages(self) -> int:
        """How many pages there are."""
        if self.num_pages is None:
            return self.slots * self.pages_of_one
        return self.num_pages


def few_parts(rows: int, prompts: Sequence[int] = Limits.prompts) -> tuple[int, ...]:
    """Returns `prompts`, of which none is above the number of sequences.

    For engines that aren't used for long: there is less to compile, and few long
    prompts take more steps.
    """
    return tuple(sorted({min(number, rows) for number in prompts}))


def check(cfg: ModelConfig, limits: Limits) -> None:
    """Refuses a model that generates no text, or lacks what the limits ask for.

    Raises:
      ValueError: its router can't choose for new tokens, it has fewer positions, no MTP
        module, or a smaller vocabulary.
    """
    kind = cfg.moe.router.kind
    if reason := ROUTERS[kind].no_text:
        raise ValueError(
            f"model.moe.router.kind={kind!r} {reason}, and for new tokens there are "
            "none: such a model generates no text."
        )
    if limits.max_length > cfg.max_positions:
        raise ValueError(
            f"max_length={limits.max_length} must be at most the model's "
            f"max_positions={cfg.max_positions}."
        )
    if limits.drafts and not cfg.mtp_depth:
        raise ValueError(
            f"drafts={limits.drafts} needs a model with an MTP module; this one has "
            "mtp_depth=0."
        )
    if limits.top_logprobs > cfg.vocab_size:
        raise ValueError(
            f"top_logprobs={limits.top_logprobs} must be at most "
            f"vocab_size={cfg.vocab_size}."
        )


def _smallest(sizes: Sequence[int], needed: int) -> int:
    """Returns the smallest size that is enough."""
    return next(size for size in sizes if size >= needed)
