"""Clients of a served model: streamed completions over HTTP, many at once.

They are coroutines of one event loop with sockets of their own and no library, so that
clients cost a machine little that also serves. `together` keeps a number of requests
underway; `arriving` sends them at a rate, whatever becomes of those before.
"""

import asyncio
import contextlib
import itertools
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Sequence
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
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def complete(self, ask: Ask) -> Answer:
        """Asks for exactly so many of the likeliest tokens, as a stream."""
        stream, status = _Stream(), CLOSED
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(self._patience):
                reader = await self._send(_body(self._target, ask))
                status, headers = await _read_head(reader)
                stream.is_refusal = status != 200
                async for piece in _read_body(reader, headers):
                    stream.add(piece)
            if headers.get("connection") == "close":
                self.close()
        except TimeoutError:
            status = HUNG
            stream.error = f"It took more than {self._patience:g} s."
            self.close()
        except (OSError, EOFError, ValueError) as error:
            stream.error = f"{type(error).__name__}: {error}"
            self.close()
        ended, times = time.perf_counter(), stream.times
        return Answer(
            ask,
            status,
            stream.text,
            stream.tokens,
            begun,
            first=times[0] if times else ended,
            ended=ended,
            gaps=[after - before for before, after in itertools.pairwise(times)],
            error=stream.error or ("" if stream.is_done else "It has no end."),
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _send(self, request: bytes) -> asyncio.StreamReader:
        if self._reader is None or self._reader.at_eof():
            self.close()
            secure = None
            if self._target.tls:
                secure = ssl.create_default_context()
                secure.check_hostname, secure.verify_mode = False, ssl.CERT_NONE
            self._reader, self._writer = await asyncio.open_connection(
                self._target.host, self._target.port, ssl=secure
            )
        assert self._writer is not None
        self._writer.write(request)
        await self._writer.drain()
        return self._reader


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


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Returns the status, and the headers by their names in small letters."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return int(first.split(" ", 2)[1]), headers


async def _read_body(
    reader: asyncio.StreamReader, headers: dict[str, str]
) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers.get("content-length", 0)))
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    with contextlib.suppress(EOFError):
        await reader.readline()


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
