"""An ASGI app asked without a network, as a server would ask it."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

SECOND = 1.0


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    passed: list[tuple[Any, bytes]]  # scopes and bodies that came to the app inside

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]["message"]


def ask(
    wrap: Any,
    method: str,
    path: str,
    body: bytes | Iterable[bytes | float] = b"",
    headers: dict[str, str] | None = None,
    leaves: bool = False,
) -> Answer | None:
    """Returns what `wrap(inner)` answers, or None if it says nothing.

    `body` is sent in pieces; a number among them is a wait in seconds. After the last
    one the body is at its end, or the client leaves.
    """
    pieces = iter([body] if isinstance(body, bytes) else body)
    passed: list[tuple[Any, bytes]] = []
    sent: list[Any] = []

    async def receive() -> Any:
        for piece in pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                return {"type": "http.request", "body": piece, "more_body": True}
        last = {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.disconnect"} if leaves else last

    async def send(message: Any) -> None:
        sent.append(message)

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        passed.append((scope, message["body"]))
        start = {"type": "http.response.start", "status": 200, "headers": []}
        await send(start)
        await send({"type": "http.response.body", "body": b"inside"})

    encoded = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": encoded}
    asyncio.run(wrap(inner)(scope | {"query_string": b"a=b"}, receive, send))
    if not sent:
        return None
    start, *rest = sent
    named = {k.decode(): v.decode() for k, v in start["headers"]}
    text = b"".join(message["body"] for message in rest)
    return Answer(start["status"], named, text, passed)
