"""Refusals as OpenAI's API words them, over plain ASGI."""

import dataclasses
import json
from typing import Any

Headers = tuple[tuple[str, str], ...]


@dataclasses.dataclass(eq=False)  # as exceptions are hashed
class Refused(Exception):
    """A request that gets no other answer than this.

    `field` is the one of its body that is at fault, if one is.
    """

    status: int
    message: str
    field: str | None = None
    headers: Headers = ()


def start_and_body(refused: Refused) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the ASGI messages that answer so: one line, as JSON."""
    kind = "invalid_request_error" if refused.status < 500 else "unavailable"
    error = {"message": refused.message, "type": kind, "param": refused.field}
    body = json.dumps({"error": error | {"code": refused.status}}).encode()
    own = (("content-type", "application/json"), ("content-length", str(len(body))))
    headers = [(k.encode(), v.encode()) for k, v in (*own, *refused.headers)]
    start = {"type": "http.response.start", "status": refused.status}
    return start | {"headers": headers}, {"type": "http.response.body", "body": body}


async def answer(refused: Refused, send: Any) -> None:
    """Sends it, whole; the connection stays open for the next request."""
    for message in start_and_body(refused):
        await send(message)
