"""Decodes the tokens of many requests at once, which come and go between steps.

    engine = Engine(cfg, variables, Limits(rows=(1, 8), max_length=512))
    for done in engine.complete([(prompt, Sampling(max_new_tokens=64)), ...]):
        print(done.number, done.tokens)

A request waits until a slot and enough pages for its longest completion are free. Then
its prompt is read in chunks, each in a step that also decodes all other requests: so a
long prompt delays no one by more than its chunks. Several are read side by side, the
oldest prompt's first (`jmoe.decode.reading`). All programs are compiled when the engine
is made, and none later.

The loop here decides who takes part in a step; what a step computes is a pure function
(`jmoe.decode.step`).
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jmoe.config import ModelConfig
from jmoe.decode.batch import DecodeRows, PrefillChunks
from jmoe.decode.limits import Limits, StepSize, check
from jmoe.decode.live import Live, PromptChunk, make_chunks, make_rows
from jmoe.decode.pages import Pages
from jmoe.decode.programs import OneDevice
from jmoe.decode.reading import take_chunks
from jmoe.decode.requests import Completion, Sampling, check_prompt
from jmoe.decode.sampling import Sampled
from jmoe.decode.stats import Observe, StepStats, ignore
from jmoe.decode.step import StepResult
from jmoe.decode.text import Text, TextStream


class Programs(Protocol):
    """What runs steps: see `jmoe.decode.programs.OneDevice`."""

    parts: int
    turns: int

    def warm_up(self, size: StepSize) -> None: ...

    def run(self, rows: DecodeRows, chunks: PrefillChunks) -> list[StepResult]: ...

    def flush(self) -> list[StepResult]: ...


MakePrograms = Callable[[ModelConfig, Any, Limits], Programs]


LIMITS = Limits()
GREEDY = Sampling()


class QueueFull(RuntimeError):
    """Says that a request must wait to be submitted: as many are as may be."""


class Update(NamedTuple):
    """A request's completion, which has grown by so many tokens, or has ended."""

    completion: Completion
    new: int


class _Asked(NamedTuple):
    """Names who takes part in a step, by the devices' parts."""

    rows: list[list[Live]]
    chunks: list[list[PromptChunk]]
    size: StepSize

    def right(self, found: StepResult) -> int:
        """Returns how many of the rows' drafts a step has found to be right."""
        new_PB = np.reshape(found.new_B, (len(self.rows), self.size.rows))
        each = zip(self.rows, new_PB, strict=True)
        return sum(int((new_B[: len(lives)] - 1).sum()) for lives, new_B in each)


class Engine:
    """Requests go in by `submit`; each `step` returns those that have changed.

    It is not for several threads. most_waiting: how many requests should wait at most,
    for whoever refuses others; not above the limits' `queue`.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        variables: Any,
        limits: Limits = LIMITS,
        text: Text | None = None,
        programs: MakePrograms = OneDevice,
        observe: Observe = ignore,
        compiled: Callable[[StepSize, float], None] = lambda size, seconds: None,
    ):
        """Prepares the weights and compiles.

        Args:
          variables: {"params": ..., "router_state": ...}.
          text: of tokens; requests with `stop_texts` need it.
          programs: makes what runs steps.
          observe: is told what each step did, behind it.
          compiled: is told of each size that is compiled, and in how many seconds.

        Raises:
          ValueError: the model doesn't have what the limits ask for, or its routers
            can't choose for new tokens.
        """
        check(cfg, limits)
        self.cfg, self.limits, self._text = cfg, limits, text
        self.most_waiting = limits.queue
        self.programs = programs(cfg, variables, limits)
        parts, turns = self.programs.parts, self.programs.turns
        self._pages = [Pages(limits.pages * turns) for _ in range(parts)]
        # Those whose numbers leave the same when divided by `turns` are one set.
        self._slots = [list(range(limits.slots * turns))[::-1] for _ in range(parts)]
        self._asked: collections.deque[_Asked] = collections.deque()
        self._waiting: collections.deque[Live] = collections.deque()
        self._live: list[Live] = []
        self._numbers = itertools.count()
        self._turn = 0
        self._cancelled: list[Live] = []
        self._observe, self._since = observe, 0.0
        for size in limits.sizes:
            began = time.perf_counter()
            self.programs.warm_up(size)
            compiled(size, time.perf_counter() - began)

    def submit(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> int:
        """Returns the number of a request, which will begin once there is room.

        Raises:
          ValueError: it can't be served.
          QueueFull: too many wait.
        """
        self.check(prompt, sampling)
        if len(self._waiting) >= self.limits.queue:
            raise QueueFull(f"queue={self.limits.queue} requests wait already.")
        number = next(self._numbers)
        accepted = [0] * self.limits.drafts
        completion = Completion(number, accepted=accepted)
        live = Live(list(prompt), sampling, completion, time.perf_counter())
        if sampling.stop_texts:
            assert self._text is not None, "checked above"
            live.stream = TextStream(self._text, stop_texts=sampling.stop_texts)
        self._waiting.append(live)
        return number

    def cancel(self, number: int) -> bool:
        """Ends a request; returns whether there was one. Others go on as they were."""
        for live in (*self._waiting, *self._live):
            completion = live.completion
            if completion.number == number and not completion.finish_reason:
                completion.finish_reason = "cancelled"
                self._cancelled.append(live)
                return True
        return False

    @property
    def slots(self) -> int:
        """How many requests are read or decoded at a time."""
        return self.limits.slots * self.programs.turns * self.programs.parts

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._live)

    @property
    def longest_wait(self) -> float:
        """For how many seconds the first of those that wait has waited."""
        if not self._waiting:
            return 0.0
        return time.perf_counter() - self._waiting[0].submitted

    def step(self) -> list[Update]:
        """Decodes a token, at least, of each request whose prompt is read.

        Returns the requests that have grown or ended, with those cancelled since.
        """
        updates = [Update(live.completion, 0) for live in self._cancelled]
        self._cancelled = []
        self._leave()
        self._admit()
        if not self._asked:
            self._since = time.perf_counter()
        done = []
        for found in self._run(self._ask()):
            asked = self._asked.popleft()
            changed = list(self._take(asked, found))
            updates.extend(changed)
            done.append((asked, found, sum(new for _, new in changed)))
        self._leave()
        self._tell(done)
        return updates

    def complete(
        self, requests: Iterable[tuple[Sequence[int], Sampling]]
    ) -> Iterator[Completion]:
        """Yields the completions of requests as they end, numbered in their order.

        A request that can't be served ends with the reason in `error`.
        """
        number_of: dict[int, int] = {}
        left = enumerate(requests)
        try:
            while True:
                for number, request in self._next(left):
                    try:
                        number_of[self.submit(*request)] = number
                    except ValueError as error:
                        yield Completion(
                            number, finish_reason="error", error=str(error)
                        )
                if not number_of:
                    return
                for done, _ in self.step():
                    if done.finish_reason and done.number in number_of:
                        number = number_of.pop(done.number)
                        yield dataclasses.replace(done, number=number)
        finally:
            for number in number_of:
                self.cancel(number)

    def _next(self, left: Iterator[Any]) -> Iterator[Any]:
        """Yields as many of what is left as may wait."""
        while len(self._waiting) < self.limits.queue:
            following = next(left, None)
            if following is None:
                return
            yield following

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Refuses a request that can't be served, now or later. Any thread may ask.

        Raises:
          ValueError: it is too long, has a token outside the vocabulary, or asks for
            what the engine wasn't made for.
        """
        limits = self.limits
        length = limits.max_length
        check_prompt(self.cfg, prompt, sampling.max_new_tokens, length)
        if sampling.logprobs > limits.top_logprobs:
            raise ValueError(
                f"logprobs={sampling.logprobs} must be at most "
                f"top_logprobs={limits.top_logprobs}."
            )
        if sampling.stop_texts and self._text is None:
            raise ValueError("stop_texts need an engine that knows the tokenizer.")

    def _admit(self) -> None:
        """Gives those that wait a slot and pages, in their order."""
        while self._waiting:
            live = self._waiting[0]
            pages = -(-live.length // self.limits.page_size)
            parts = [
                part
                for part, slots in enumerate(self._slots)
                if slots and self._pages[part].num_free >= pages
            ]
            if not parts:
                return
            self._waiting.popleft()
            live.part = max(parts, key=lambda part: len(self._slots[part]))
            live.slot = self._slots[live.part].pop()
            taken = self._pages[live.part].take(pages)
            assert taken is not None, "as many are free"
            live.pages = taken
            self._live.append(live)

    def _ask(self) -> _Asked | None:
        """Returns who takes part in the next step; None if there is nothing to do."""
        turns = self.programs.turns
        here = [live for live in self._live if live.slot % turns == self._turn]
        self._turn = (self._turn + 1) % turns
        rows: list[list[Live]] = [[] for _ in self._slots]
        unread: list[list[Live]] = [[] for _ in self._slots]
        for live in here:
            (rows if live.is_read else unread)[live.part].append(live)
        if not here:
            return None
        chunks, chunk = take_chunks(self.limits, unread)
        needed = max(map(len, rows)), max(map(len, chunks)), chunk
        return _Asked(rows, chunks, self.limits.size(*needed))

    def _run(self, asked: _Asked | None) -> list[StepResult]:
        """Returns what the steps that are done found."""
        if asked is None:
            return self.programs.flush()
        self._asked.append(asked)
        rows = make_rows(self.limits, asked.rows, asked.size.rows)
        chunks = make_chunks(self.limits, asked.chunks, asked.size)
        return self.programs.run(rows, chunks)

    def _take(self, asked: _Asked, found: StepResult) -> Iterator[Update]:
        """Yields the requests that a step has found tokens of, with these."""
        for part, lives in enumerate(asked.rows):
            for i, live in enumerate(lives, start=part * asked.size.rows):
                new = int(found.new_B[i])
                self._count(live, new - 1)
                drawn = Sampled(*(x[i, :new] for x in found.rows))
                yield self._grow(live, drawn, found.draft_BK[i])
        for part, chunks in enumerate(asked.chunks):
            for i, chunk in enumerate(chunks, start=part * asked.size.prompts):
                live = chunk.live
                live.read = chunk.end
                if chunk.is_last:
                    drawn = Sampled(*(x[i : i + 1] for x in found.chunks))
                    yield self._grow(live, drawn, found.draft_AK[i])

    def _tell(self, done: list[tuple[_Asked, StepResult, int]]) -> None:
        """Tells of steps that have ended, with how many new tokens came of each."""
        now, limits = time.perf_counter(), self.limits
        pages = limits.pages * self.programs.turns
        free = [part.num_free for part in self._pages]
        for asked, found, new_tokens in done:
            rows = sum(map(len, asked.rows))
            stats = StepStats(
                seconds=(now - self._since) / len(done),
                rows=rows,
                prompt_tokens=sum(c.count for part in asked.chunks for c in part),
                new_tokens=new_tokens,
                drafted=rows * limits.drafts,
                accepted=asked.right(found),
                waiting=len(self._waiting),
                live=len(self._live),
                pages_used=pages * len(free) - sum(free),
                pages=pages * len(free),
                count_LE=np.asarray(found.count_LE),
                dropped_L=np.asarray(found.dropped_L),
            )
            self._observe(stats)
        if done:
            self._since = now

    def _count(self, live: Live, right: int) -> None:
        completion = live.completion
        completion.steps += 1
        for ahead in range(min(right, self.limits.drafts)):
            completion.accepted[ahead] += 1

    def _grow(self, live: Live, drawn: Sampled, drafts: Any) -> Update:
        """Adds tokens up to where the request ends."""
        completion, sampling = live.completion, live.sampling
        if completion.finish_reason:
            return Update(completion, 0)
        before = len(completion.tokens)
        passed = time.perf_counter() - live.submitted
        for i, token in enumerate(drawn.token.tolist()):
            if token in sampling.stop_ids:
                completion.finish_reason = "stop"
                break
            completion.tokens.append(token)
            completion.times.append(passed)
            completion.logprobs.append(float(drawn.logprob[i]))
            if sampling.logprobs:
                likely = zip(drawn.top_token[i], drawn.top_logprob[i], strict=True)
                top = itertools.islice(likely, sampling.logprobs)
                completion.top_logprobs.append({int(t): float(p) for t, p in top})
            if live.stream is not None:
                live.stream.add([token])
                if live.stream.is_stopped:
                    completion.finish_reason = "stop"
                    break
            if len(completion.tokens) == sampling.max_new_tokens:
                completion.finish_reason = "length"
                break
        live.tail = [
            completion.tokens[-1] if completion.tokens else 0,
            *drafts.tolist(),
        ]
        return Update(completion, len(completion.tokens) - before)

    def _leave(self) -> None:
        """Frees what requests that have ended had."""
        for live in self._live:
            if live.completion.finish_reason:
                self._pages[live.part].give_back(live.pages)
                self._slots[live.part].append(live.slot)
        self._live = [x for x in self._live if not x.completion.finish_reason]
        waiting = [x for x in self._waiting if not x.completion.finish_reason]
        self._waiting = collections.deque(waiting)
