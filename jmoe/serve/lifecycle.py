"""How a server ends: the signals that stop it, and draining."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from jmoe.config.serve import ServeConfig
from jmoe.serve.answers import Refused, answer

DRAINING = Refused(503, "The server is shutting down.", headers=(("retry-after", "5"),))
DRAINS = "Draining: no new requests; those in flight are finished."


class Gate:
    """An ASGI app that knows the answers in flight, and can be closed to new requests.

    Answers are to POST; who only looks, which may be for long, isn't waited for.
    """

    def __init__(self, app: Any):
        self._app = app
        self._in_flight: set[asyncio.Task] = set()
        self._closed = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._closed:
            return await answer(DRAINING, send)
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        task = asyncio.current_task()
        assert task is not None
        self._in_flight.add(task)
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight.discard(task)

    async def close(self, seconds: float) -> int:
        """Waits for the requests in flight; how many were cut off after `seconds`."""
        self._closed = True
        late: set[asyncio.Task] = set()
        if self._in_flight:
            _, late = await asyncio.wait(self._in_flight, timeout=seconds)
        for task in late:
            task.cancel()
        return len(late)


def url(cfg: ServeConfig) -> str:
    scheme = "http" if cfg.tls_certificate is None else "https"
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    return f"{scheme}://{host}:{cfg.port}"


class Stopped(BaseException):
    """A signal that ends the program was received."""


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Raises Stopped at SIGTERM and SIGINT, as Ctrl-C does."""

    def stop(number, frame):
        raise Stopped

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
