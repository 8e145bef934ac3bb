"""Refusals as OpenAI's API words them, over plain ASGI."""

import dataclasses
import json
from typing import Any

Headers = tuple[tuple[str, str], ...]
_ERROR_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error"}


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
    error = {
        "message": refused.message,
        "type": _error_type(refused.status),
        "param": refused.field,
    }
    body = json.dumps({"error": error | {"code": refused.status}}).encode()
    own = (("content-type", "application/json"), ("content-length", str(len(body))))
    headers = [(k.encode(), v.encode()) for k, v in (*own, *refused.headers)]
    start = {"type": "http.response.start", "status": refused.status}
    return start | {"headers": headers}, {"type": "http.response.body", "body": body}


def _error_type(status: int) -> str:
    """Returns what OpenAI's guide to error codes has for a status, or for its kind."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return _ERROR_TYPES.get(status, kind)


async def answer(refused: Refused, send: Any) -> None:
    """Sends it, whole; the connection stays open for the next request."""
    for message in start_and_body(refused):
        await send(message)
