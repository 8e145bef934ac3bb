"""The live page, its events and its metrics, as an ASGI app that only answers.

    /         one page, whole in itself: its script and style are inside
    /events   server-sent events: `snapshot`, when it differs from the last, and every
              second `clock`, the server's time, which says that it lives
    /metrics  Prometheus's text format

Nothing that a client sends is read but its path. However many listen, a snapshot is
made once a second, and only while somebody does.
"""

import asyncio
import base64
import hashlib
import importlib.resources
import json
import time
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jmoe.monitor.report_page import PALETTE
from jmoe.monitor.snapshot import Snapshot

MAX_LISTENERS = 32
STALL_SECONDS = 30.0  # that a listener may leave events unread
INTERVAL_SECONDS = 1.0

PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(
    snapshot: Callable[[], Snapshot],
    prometheus: Callable[[], bytes],
    *,
    hosts: Sequence[str] = ("*",),
    interval: float = INTERVAL_SECONDS,
    max_listeners: int = MAX_LISTENERS,
    stall_seconds: float = STALL_SECONDS,
) -> Starlette:
    """Returns the app. It can be mounted under any path.

    Args:
      snapshot: what to show; called in a thread, once an interval at most.
      prometheus: the metrics' text; called in a thread.
      hosts: what requests may call this machine; "*" is anything.
      interval: seconds between events.
      max_listeners: to events at a time; others are refused (503).
      stall_seconds: after which a listener that doesn't read is dropped.
    """
    html, policy = page()
    events = _Events(snapshot, interval, stall_seconds)
    safe = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }

    async def show(request: Request) -> Response:
        return Response(html, media_type="text/html", headers=safe)

    async def metrics(request: Request) -> Response:
        text = await asyncio.to_thread(prometheus)
        return Response(text, headers={**safe, "content-type": PROMETHEUS_TYPE})

    async def listen(request: Request) -> Response:
        if request.method == "HEAD":
            return Response(headers=safe, media_type=_Stream.media_type)
        if events.listeners >= max_listeners:
            text = f"{max_listeners} listen already; try again later."
            return PlainTextResponse(text, 503, {**safe, "retry-after": "10"})
        return _Stream(events, safe)

    return Starlette(
        routes=[
            Route("/", show, methods=["GET"]),
            Route("/events", listen, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


def page() -> tuple[str, str]:
    """Returns the page and the content security policy that it works under.

    The policy lets the browser run this script, in this style, and nothing else, and
    ask nothing of any other server.
    """
    files = importlib.resources.files("jmoe.monitor") / "live"
    html, style, draw, listen = (
        (files / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "draw.js", "page.js")
    )
    style, script = _palette() + style, draw + listen
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    html = html.replace("/* style */", style).replace("/* script */", script)
    return html, policy


class _Events:
    """Makes the text of events, the same for all who listen at a time."""

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        interval: float,
        stall_seconds: float,
    ):
        self.interval = interval
        self.stall_seconds = stall_seconds
        self.listeners = 0
        self._snapshot = snapshot
        self._making = asyncio.Lock()
        self._made_at = -interval
        self._made = ""

    async def latest(self) -> str:
        """Returns a snapshot as JSON, no older than half an interval."""
        async with self._making:
            if time.monotonic() - self._made_at > self.interval / 2:
                self._made = await asyncio.to_thread(lambda: self._snapshot().to_json())
                self._made_at = time.monotonic()
            return self._made


class _Stream(Response):
    """One listener's events, until it leaves or stops reading."""

    media_type = "text/event-stream"

    def __init__(self, events: _Events, headers: dict[str, str]):
        super().__init__(headers={**headers, "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._events.listeners += 1
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await self._send(send, gone)
        except TimeoutError:
            return  # and the server closes the connection
        finally:
            gone.cancel()
            self._events.listeners -= 1

    async def _send(self, send: Send, gone: asyncio.Future[None]) -> None:
        async def deliver(message: dict[str, object]) -> None:
            async with asyncio.timeout(self._events.stall_seconds):
                await send(message)

        start = {"type": "http.response.start", "status": 200}
        await deliver({**start, "headers": self.raw_headers})
        sent = ""
        while not gone.done():
            latest = await self._events.latest()
            text = _event("clock", json.dumps(round(time.time(), 3)))
            if latest != sent:
                text, sent = _event("snapshot", latest) + text, latest
            body = {"type": "http.response.body", "more_body": True}
            await deliver({**body, "body": text.encode()})
            await asyncio.wait([gone], timeout=self._events.interval)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has left; what it sends is thrown away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _palette() -> str:
    """Returns the report's colours, as variables for light and for dark."""
    light, dark = (
        " ".join(f"--{name}: {both[column]};" for name, both in PALETTE.items())
        for column in (0, 1)
    )
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )
