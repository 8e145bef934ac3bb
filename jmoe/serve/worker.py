"""A thread that owns an engine, and clients on event loops that wait for it.

    worker = Worker(engine, meter)
    with worker.submit([(prompt, sampling)], seconds=60) as ticket:
        async for increments in ticket:
            ...

An engine is not for several threads. So what others want of it are calls, which the
thread makes between two steps; it steps while there is work, and sleeps otherwise. What
tickets have got goes to each event loop in one call, in which short steps are put
together: to wake a client's task and to write to its socket takes as long as a small
model takes for a token.

Many clients ask again when they have an answer. So behind a step that has ended
requests the next one waits a moment for as many others: who comes just too late waits
for a whole step, and prompts that are read together are read faster.

As many requests are taken as have a place, and so many more as may wait; others are
refused at once. Who leaves the `with`, takes nothing, or has had all of its time,
gives its places back.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import NamedTuple, Self, TypeVar

from jmoe.decode.engine import Engine, Update
from jmoe.decode.requests import Completion, Sampling
from jmoe.monitor.serving import ServingMeter
from jmoe.serve.answers import Refused

T = TypeVar("T")
Request = tuple[Sequence[int], Sampling]

MOST_HELD = 1024  # tokens of a choice that a client hasn't taken
RECENT = 256  # requests whose ends tell how fast the engine is
MOST_RETRY_SECONDS = 60
HANGING_SECONDS = 120.0  # of one step
NEWS_SECONDS = 0.007  # that a token may wait, unless it is a ticket's first or last
AGAIN_SHARE = 0.1  # of a step, for which the next one waits for requests; at most for
AGAIN_SECONDS = 0.005

FAILED = Refused(503, "The engine has failed; the server's log says why.")
STOPPED = Refused(503, "The server is shutting down.", headers=(("retry-after", "5"),))
LATE = Refused(504, "The answer wasn't there by its deadline.")
SLOW = Refused(503, "The client took too long to read what it was sent.")


class Increment(NamedTuple):
    """What the completion of a ticket's request of this number has grown by.

    finish_reason: None while it goes on.
    """

    number: int
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: str | None


class Ticket:
    """One client's requests, as `Worker.submit` returns it, on one event loop.

    Iterating gives lists of increments until each request has ended; it raises Refused
    if they can't go on. Leaving the context ends those that haven't.

    Args:
      cancel: called with the ticket when its requests are to end.
      count: of its requests.
      is_streamed: whether tokens come while they are found; else each request gives one
        increment, at its end.
    """

    def __init__(
        self,
        cancel: Callable[["Ticket"], None],
        count: int,
        seconds: float,
        is_streamed: bool,
    ):
        self.loop = asyncio.get_running_loop()
        self.is_streamed = is_streamed
        self._cancel = cancel
        self._left = count
        self._most_held = MOST_HELD * count
        self._got: list[Increment] = []
        self._held = 0  # tokens in them
        self._news = asyncio.Event()
        self._refused: Refused | None = None
        self._timer = self.loop.call_later(seconds, self._give_up, LATE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._left and self._refused is None:
            self._cancel(self)

    async def __aiter__(self) -> AsyncIterator[list[Increment]]:
        while self._left:
            await self._news.wait()
            self._news.clear()
            if self._refused is not None:
                raise dataclasses.replace(self._refused)
            got, self._got, self._held = self._got, [], 0
            self._left -= sum(one.finish_reason is not None for one in got)
            yield got

    def put(self, increments: Iterable[Increment]) -> None:
        """Takes what its requests have got, on the event loop."""
        if self._refused is not None:  # it was told before the engine knew
            return
        for increment in increments:
            self._got.append(increment)
            self._held += len(increment.tokens)
        if self.is_streamed and self._held > self._most_held:
            self._give_up(SLOW)
        self._news.set()

    def refuse(self, reason: Refused) -> None:
        """Ends it, on the event loop; what wasn't taken is let go of."""
        self._refused = self._refused or reason
        self._got = []
        self._news.set()

    def _give_up(self, reason: Refused) -> None:
        if self._left and self._refused is None:
            self._cancel(self)
            self.refuse(reason)


class Worker:
    """An engine's thread. Other threads may call what isn't private.

    The engine's queue must have room for all requests that may be there at a time, with
    those that have a place.

    Args:
      meter: is told of requests, but not of steps.
    """

    def __init__(self, engine: Engine, meter: ServingMeter):
        self._engine, self._meter = engine, meter
        self._changed = threading.Condition()
        # What follows is read and written with the condition's lock.
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._count = 0  # requests that are there
        self._wanted = 0  # how many of them the next step waits for, until then
        self._wanted_by = 0.0
        self._busy = 0.0  # seconds that steps took
        self._ends: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._refused: Refused | None = None  # why no more requests are taken
        # And this by the thread alone.
        self._places: dict[int, tuple[Ticket, int]] = {}
        self._news: dict[Ticket, list[Increment]] = {}
        self._told = 0.0  # when all of it was
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, requests: Sequence[Request], seconds: float, is_streamed: bool = False
    ) -> Ticket:
        """Returns a ticket for all of these requests; called on an event loop.

        Args:
          seconds: after which those that haven't ended are given up.

        Raises:
          ValueError: one of them can't be served.
          Refused: there is no room (429), or no engine (503).
        """
        for prompt, sampling in requests:
            self._engine.check(prompt, sampling)
        count, most = len(requests), self._engine.limits.queue
        if count > most:
            raise ValueError(f"{count} completions at once; at most {most} may be.")
        with self._changed:
            if self._refused is not None:
                raise dataclasses.replace(self._refused)
            few = self._engine.slots + self._engine.most_waiting
            if self._count + count > min(most, few):
                raise self._full()
            self._count += count
            ticket = Ticket(self._cancel, count, seconds, is_streamed)
            self._put(lambda: self._begin(ticket, requests))
        return ticket

    def between_steps(
        self, function: Callable[[Engine], T]
    ) -> concurrent.futures.Future[T]:
        """Returns what `function` will return, or raise, called between two steps.

        It delays all requests. Behind the engine's end it is cancelled.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            if self._refused is not None:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._engine))
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            if self._refused is None:
                self._put(call)
            else:
                future.cancel()
        return future

    @property
    def is_well(self) -> bool:
        """Whether it takes requests, and goes on with those that it has."""
        began = self._step_began
        hangs = began is not None and time.monotonic() - began > HANGING_SECONDS
        return self._refused is None and not hangs

    def close(self) -> None:
        """Ends the thread after its step, and refuses requests that are there."""
        with self._changed:
            self._refused = self._refused or STOPPED
            self._changed.notify()
        self._thread.join()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._put(lambda: self._end(ticket))

    def _put(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self._changed.notify()

    def _full(self) -> Refused:
        """Returns the refusal that says when what waits now will have begun."""
        waiting = max(self._count - self._engine.slots, 1)
        of_one = (self._busy - self._ends[0]) / len(self._ends) if self._ends else 1.0
        seconds = min(max(math.ceil(waiting * of_one), 1), MOST_RETRY_SECONDS)
        message = f"{self._count} requests are here already; try again in {seconds} s."
        return Refused(429, message, headers=(("retry-after", str(seconds)),))

    def _work(self) -> None:
        reason = STOPPED
        try:
            while self._wait():
                self._make_calls()
                if not self._engine.is_idle:
                    self._step()
        except Exception:
            logging.getLogger(__name__).exception("The engine has failed.")
            reason = FAILED
        with self._changed:
            self._refused = self._refused or reason
        self._make_calls()  # of which each sees that it is too late
        for ticket in {ticket for ticket, _ in self._places.values()}:
            _call_on(ticket.loop, ticket.refuse, reason)

    def _wait(self) -> bool:
        """Returns once there is something to do; false if that is to end.

        Whom the next step waits for have until `_wanted_by`.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._calls or self._refused or not self._engine.is_idle
            )
            self._changed.wait_for(
                lambda: self._refused or self._count >= self._wanted,
                self._wanted_by - time.monotonic(),
            )
            self._wanted = 0
            return self._refused is None

    def _make_calls(self) -> None:
        with self._changed:
            calls = list(self._calls)
            self._calls.clear()
        for call in calls:
            call()

    def _begin(self, ticket: Ticket, requests: Sequence[Request]) -> None:
        if self._refused is not None:
            _call_on(ticket.loop, ticket.refuse, self._refused)
            return
        for place, request in enumerate(requests):
            self._meter.request_started()
            self._places[self._engine.submit(*request)] = ticket, place

    def _end(self, ticket: Ticket) -> None:
        for number, (of, _) in self._places.items():
            if of is ticket:
                self._engine.cancel(number)

    def _step(self) -> None:
        self._step_began = began = time.monotonic()
        updates = self._engine.step()
        self._step_began = None
        before = len(self._places)
        urgent = self._note(updates)
        ended = before - len(self._places)
        now = time.monotonic()
        with self._changed:  # before anyone is told, who may then ask again
            self._busy += now - began
            if ended:
                self._wanted = min(self._count, self._engine.slots)
                patience = min(AGAIN_SHARE * (now - began), AGAIN_SECONDS)
                self._wanted_by = now + patience
            self._count -= ended
            self._ends.extend([self._busy] * ended)
        if now - self._told >= NEWS_SECONDS:
            self._told, urgent = now, set(self._news)
        self._tell(urgent & self._news.keys())

    def _note(self, updates: Iterable[Update]) -> set[Ticket]:
        """Notes what tickets have got; returns those that are to be told at once."""
        urgent = set()
        for completion, new in updates:
            # A pipeline may tell of a request again that has left it.
            ticket, place = self._places.get(completion.number, (None, 0))
            if ticket is None:
                continue
            self._measure(completion, new)
            is_end = completion.finish_reason is not None
            if is_end:
                del self._places[completion.number]
            if completion.finish_reason == "cancelled":
                self._news.pop(ticket, None)
                continue
            if not ticket.is_streamed:
                new = len(completion.tokens) if is_end else 0
            if new or is_end:
                increment = _increment(place, completion, new)
                self._news.setdefault(ticket, []).append(increment)
                if is_end or new == len(completion.tokens):
                    urgent.add(ticket)
        return urgent

    def _tell(self, tickets: Iterable[Ticket]) -> None:
        of_loop: dict[asyncio.AbstractEventLoop, list] = {}
        for ticket in tickets:
            news = self._news.pop(ticket)
            of_loop.setdefault(ticket.loop, []).append((ticket, news))
        for loop, news in of_loop.items():
            _call_on(loop, _put_all, news)

    def _measure(self, completion: Completion, new: int) -> None:
        times, before = completion.times, len(completion.tokens) - new
        if new and not before:
            self._meter.first_token(times[0])
        elif new:
            self._meter.between_tokens(times[-1] - times[before - 1], new)
        if completion.finish_reason:
            self._meter.request_ended(completion.finish_reason, len(times))


def _increment(place: int, completion: Completion, new: int) -> Increment:
    """Returns the completion's last `new` tokens, which no step changes any more."""
    first = len(completion.tokens) - new
    return Increment(
        place,
        completion.tokens[first:],
        completion.logprobs[first:],
        completion.top_logprobs[first:],
        completion.finish_reason,
    )


def _put_all(news: Iterable[tuple[Ticket, list[Increment]]]) -> None:
    for ticket, increments in news:
        ticket.put(increments)


def _call_on(
    loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object
) -> None:
    """Calls a function on an event loop; if that has ended, nobody waits there."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        assert loop.is_closed()
