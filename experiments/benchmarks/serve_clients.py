"""Clients of a served model: streamed completions over HTTP, many at once.

They are coroutines of one event loop and read their sockets themselves, so that clients
cost a machine little that also serves. `together` keeps a number of requests
underway; `arriving` sends them at a rate, whatever becomes of those before.
"""

import asyncio
import itertools
import json
import random
import ssl
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from experiments.benchmarks.hostile import percentile
from experiments.benchmarks.hostile_requests import CLOSED, HUNG, Target
from experiments.benchmarks.serve_model import Ask

_DONE = "[DONE]"


class Answer(NamedTuple):
    """What became of a request.

    status: of HTTP, or CLOSED or HUNG where there was none. begun, first, ended: when
    it was sent, when the first token came, and when all was over, in seconds by
    `time.perf_counter`. gaps: seconds between one token and the next. error: what the
    server or the connection said, where it isn't answered.
    """

    ask: Ask
    status: int
    text: str
    tokens: list[int]
    begun: float
    first: float
    ended: float
    gaps: list[float]
    error: str

    @property
    def is_whole(self) -> bool:
        return (
            self.status == 200 and not self.error and len(self.tokens) == self.ask.new
        )

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


class Connection:
    """A connection to the server, opened again where the server has closed it."""

    def __init__(self, target: Target, patience: float):
        """`patience`: seconds that a request may take before it counts as hung."""
        self._target, self._patience = target, patience
        self._wire: _Wire | None = None

    async def complete(self, ask: Ask) -> Answer:
        """Asks for exactly so many of the likeliest tokens, as a stream."""
        reply = _Reply()
        stream = reply.stream
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(self._patience):
                wire = await self._opened()
                wire.send(_body(self._target, ask), reply)
                await reply.end
            if reply.headers.get("connection") == "close":
                self.close()
        except TimeoutError:
            reply.status = HUNG
            stream.error = f"It took more than {self._patience:g} s."
            self.close()
        except (OSError, EOFError, ValueError) as error:
            stream.error = f"{type(error).__name__}: {error}"
            self.close()
        ended, times = time.perf_counter(), stream.times
        return Answer(
            ask,
            reply.status,
            stream.text,
            stream.tokens,
            begun,
            first=times[0] if times else ended,
            ended=ended,
            gaps=[after - before for before, after in itertools.pairwise(times)],
            error=stream.error or ("" if stream.is_done else "It has no end."),
        )

    def close(self) -> None:
        if self._wire is not None:
            self._wire.transport.close()
        self._wire = None

    async def _opened(self) -> "_Wire":
        if self._wire is None or self._wire.transport.is_closing():
            secure = None
            if self._target.tls:
                secure = ssl.create_default_context()
                secure.check_hostname, secure.verify_mode = False, ssl.CERT_NONE
            address = self._target.host, self._target.port
            loop = asyncio.get_running_loop()
            _, self._wire = await loop.create_connection(_Wire, *address, ssl=secure)
        return self._wire


class _Wire(asyncio.Protocol):
    """An open connection, and the reply that comes by it."""

    transport: asyncio.Transport
    _reply: "_Reply | None" = None

    def send(self, request: bytes, reply: "_Reply") -> None:
        self._reply = reply
        self.transport.write(request)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._reply is not None:
            self._reply.add(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reply is not None:
            self._reply.fail(exc or EOFError("The server has closed the connection."))


async def together(
    target: Target, asks: Sequence[Ask], at_once: int, patience: float = 600.0
) -> list[Answer]:
    """Returns the answers to all requests, of which so many are underway at a time."""
    left = iter(asks)
    answers: list[Answer] = []

    async def ask_on() -> None:
        connection = Connection(target, patience)
        for ask in left:
            answers.append(await connection.complete(ask))
        connection.close()

    await asyncio.gather(*(ask_on() for _ in range(at_once)))
    return answers


async def arriving(
    target: Target,
    asks: Iterator[Ask],
    rate: float,
    seconds: float,
    patience: float,
    seed: int = 0,
) -> list[Answer]:
    """Returns the answers to requests that come at random, on average `rate` a second.

    Each has a connection of its own, as each is somebody else's.
    """
    draw = random.Random(seed)
    answers: list[Answer] = []

    async def ask_once(ask: Ask) -> None:
        connection = Connection(target, patience)
        answers.append(await connection.complete(ask))
        connection.close()

    start = time.perf_counter()
    due = draw.expovariate(rate)
    async with asyncio.TaskGroup() as underway:
        while due < seconds:
            await asyncio.sleep(max(start + due - time.perf_counter(), 0))
            underway.create_task(ask_once(next(asks)))
            due += draw.expovariate(rate)
    return answers


class _Stream:
    """Server-sent events as they come: their text, and when each token was there.

    What is no stream is a refusal, and kept as an error.
    """

    def __init__(self):
        self.text = ""
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.error = ""
        self.is_done = self.is_refusal = False
        self._rest = b""

    def add(self, piece: bytes) -> None:
        if self.is_refusal:
            self.error += piece.decode(errors="replace")
            return
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip().decode())

    def _take(self, event: str) -> None:
        if event == _DONE:
            self.is_done = True
            return
        sent = json.loads(event)
        if "error" in sent:
            self.error = json.dumps(sent["error"])
            return
        now = time.perf_counter()
        for choice in sent["choices"]:
            self.text += choice["text"]
            new = choice.get("token_ids") or []
            self.tokens += new
            self.times += [now] * len(new)


def _body(target: Target, ask: Ask) -> bytes:
    options = {"stream": True, "return_token_ids": True}
    return target.post(target.asked(prompt=ask.prompt, max_tokens=ask.new, **options))


class _Reply:
    """An HTTP response as it comes: its head, and its body at once or in chunks.

    status: CLOSED until there is a head. end: is set once all is there, or to the error
    that keeps it from it.
    """

    def __init__(self) -> None:
        self.status = CLOSED
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.headers: dict[str, str] = {}
        self.stream = _Stream()
        self._rest = b""

    def add(self, data: bytes) -> None:
        if self.end.done():
            return
        self._rest += data
        try:
            if self._has_head() and self._has_body():
                self.end.set_result(None)
        except ValueError as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        if not self.end.done():
            self.end.set_exception(error)

    def _has_head(self) -> bool:
        if self.status == CLOSED:
            head, end, rest = self._rest.partition(b"\r\n\r\n")
            if not end:
                return False
            first, *lines = head.decode("latin-1").split("\r\n")
            pairs = (line.partition(":") for line in lines)
            self.headers = {name.lower(): value.strip() for name, _, value in pairs}
            self.status = int(first.split(" ", 2)[1])
            self.stream.is_refusal = self.status != 200
            self._rest = rest
        return True

    def _has_body(self) -> bool:
        """Gives on what is there of the body; returns whether that is its end."""
        if self.headers.get("transfer-encoding") != "chunked":
            length = int(self.headers.get("content-length", 0))
            is_there = len(self._rest) >= length
            if is_there:
                self.stream.add(self._rest[:length])
            return is_there
        while b"\r\n" in self._rest:
            line, _, rest = self._rest.partition(b"\r\n")
            size = int(line.split(b";")[0], 16)
            if len(rest) < size + 2:  # with the end of its line
                return False
            self.stream.add(rest[:size])
            self._rest = rest[size + 2 :]
            if not size:
                return True
        return False


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns tokens a second, and 99th percentiles, of answers that are all whole."""
    begun = min(answer.begun for answer in answers)
    ended = max(answer.ended for answer in answers)
    tokens = sum(len(answer.tokens) for answer in answers)
    gaps = [gap for answer in answers for gap in answer.gaps]
    firsts = [answer.first - answer.begun for answer in answers]
    return {
        "requests": len(answers),
        "tokens": tokens,
        "seconds": ended - begun,
        "tokens_per_second": tokens / (ended - begun),
        "gap_p50": percentile(gaps, 50),
        "gap_p99": percentile(gaps, 99),
        "first_p50": percentile(firsts, 50),
        "first_p99": percentile(firsts, 99),
    }
