"""What stands between clients and an engine: an ASGI app around the engine's own.

It lets through the routes that are served and no others, whoever has a key, and bodies
that are whole and within limits. What passes is made anew: headers that no route needs,
the key among them, and query strings stay here. It needs no library, and knows neither
Ray nor vLLM. `protocol` bounds what comes before a request is one.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
from typing import Any, NamedTuple

from jmoe.config import from_dict, to_dict
from jmoe.config.serve import LimitsConfig
from jmoe.serve import answers, bodies
from jmoe.serve.answers import Refused

ROUTES = {
    "/health": "GET",
    "/metrics": "GET",
    "/v1/models": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
}
PAGE = "/monitor"  # the live page of jmoe's own engine
PAGES = {PAGE: "GET", f"{PAGE}/": "GET", f"{PAGE}/events": "GET"}
ROUTES |= PAGES
PASSED_ON = (b"host", b"accept", b"content-type", b"user-agent")
LINGER_SECONDS = 2.0  # that a client goes on sending what isn't read
CLOSE = ("connection", "close")


class Access(NamedTuple):
    """Says who may ask what.

    `digests` are SHA-256 of the keys, in hexadecimal; without any there is no need for
    one. `open_routes` need none.
    """

    limits: LimitsConfig
    digests: tuple[str, ...] = ()
    open_routes: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(self._asdict() | {"limits": to_dict(self.limits)})

    @classmethod
    def from_json(cls, text: str) -> "Access":
        fields = json.loads(text)
        limits = from_dict(LimitsConfig, fields["limits"])
        return cls(limits, tuple(fields["digests"]), tuple(fields["open_routes"]))


def digest(key: str) -> str:
    """Returns what is kept of a key, and compared."""
    return hashlib.sha256(key.encode("latin-1")).hexdigest()


class Front:
    """An ASGI app that passes to another what `access` allows."""

    def __init__(self, app: Any, access: Access):
        self._app = app
        self._access = access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        try:
            self._admit(scope)
            body = await self._read(scope, receive)
        except Refused as refused:
            most = self._access.limits.body_kib * 1024
            return await _answer_and_close(refused, most, receive, send)
        if body is None:  # the client is gone
            return
        try:
            if scope["method"] == "POST":
                bodies.check(body, self._access.limits)
        except Refused as refused:
            return await answers.answer(refused, send)
        passed = _passed_on(scope, len(body))
        await self._app(passed, _Replayed(body, receive), send)

    def _admit(self, scope: Any) -> None:
        """Refuses by the first line and the headers, before any of the body is read."""
        path, method = scope["path"], scope["method"]
        self._check_headers(scope)
        if (PAGE if path in PAGES else path) not in self._access.open_routes:
            self._check_key(scope)
        if path not in ROUTES:
            raise Refused(404, f"There is only {', '.join(ROUTES)}.")
        if method != ROUTES[path]:
            allow = (("allow", ROUTES[path]),)
            raise Refused(405, f"{path} is for {ROUTES[path]}.", headers=allow)

    def _check_headers(self, scope: Any) -> None:
        """Checks the headers.

        The protocol bounds what it waits for, and takes what is there at once.
        """
        most = self._access.limits.header_kib
        size = len(scope["path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > most * 1024:
            message = f"The headers have more than {most} KiB (limits.header_kib)."
            raise Refused(431, message)

    def _check_key(self, scope: Any) -> None:
        if not self._access.digests:
            return
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        given = digest(key.strip())
        # All are compared, so that time doesn't tell which.
        equal = [hmac.compare_digest(given, known) for known in self._access.digests]
        if scheme.lower() != "bearer" or not any(equal):
            message = "This needs a key that is known here: Authorization: Bearer KEY."
            raise Refused(401, message, headers=(("www-authenticate", "Bearer"),))

    async def _read(self, scope: Any, receive: Any) -> bytes | None:
        """Returns the whole body, or None if the client left."""
        limits = self._access.limits
        most = limits.body_kib * 1024
        declared = _header(scope, b"content-length")
        if declared.isdecimal() and int(declared) > most:
            raise _too_large(limits)
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _too_large(limits)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise Refused(
                408,
                f"The body wasn't there after {limits.body_seconds:g} s "
                "(limits.body_seconds).",
            ) from error


class _Replayed:
    """ASGI's `receive`, for a body that was read already."""

    def __init__(self, body: bytes, receive: Any):
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Any:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None  # let go of once it is passed on
        return {"type": "http.request", "body": body, "more_body": False}


def _passed_on(scope: Any, length: int) -> Any:
    headers = [(name, value) for name, value in scope["headers"] if name in PASSED_ON]
    headers.append((b"content-length", str(length).encode()))
    return scope | {"headers": headers, "query_string": b""}


def _header(scope: Any, name: bytes) -> str:
    """Returns the header, empty if it isn't there or is there twice."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else ""


def _too_large(limits: LimitsConfig) -> Refused:
    return Refused(
        413, f"The body has more than {limits.body_kib} KiB (limits.body_kib)."
    )


async def _answer_and_close(
    refused: Refused, most: int, receive: Any, send: Any
) -> None:
    """Answers a request whose body isn't read to its end.

    A client that reads only once it has sent everything would find a closed connection
    and no answer. So up to `most` bytes that it still sends are thrown away, for a
    moment.
    """
    refused.headers += (CLOSE,)
    start, body = answers.start_and_body(refused)
    await send(start)
    await send(body | {"more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while most > 0 and (message := await receive()).get("more_body", False):
                most -= len(message["body"])
    await send({"type": "http.response.body", "body": b""})
