"""Every kind of hostile request to our front on uvicorn, with no Ray and no vLLM."""

import functools
import json
import os
from typing import Any

import pytest

from experiments.benchmarks import hostile, hostile_requests
from experiments.benchmarks.hostile_requests import COMPLETIONS, KINDS, Target
from jmoe.config.serve import LimitsConfig
from jmoe.serve.front import Access, Front, digest
from jmoe.serve.protocol import LimitedProtocol
from tests.serve.running import address, running

LIMITS = LimitsConfig(header_kib=8, header_seconds=1, body_kib=64, body_seconds=1)
KEY = "first-key-of-tests"
MODELS = b'{"data": [{"id": "m"}]}'
ANSWER = b'{"choices": [{"text": "49"}]}'


async def engine(scope: Any, receive: Any, send: Any) -> None:
    """Serves all routes there may be, and refuses a completion that isn't normal."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    status, answer = 200, MODELS
    if scope["path"] == COMPLETIONS:
        status, answer = (200 if is_normal(body) else 422), ANSWER
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def is_normal(body: bytes) -> bool:
    try:
        return json.loads(body) == Target("", 0, False, None, "m").asked()
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    for module, name, value in [
        (hostile, "SETTLE_SECONDS", 0.1),
        (hostile_requests, "ENDLESS", 2**22),
        (hostile_requests, "PATIENCE", 20.0),
    ]:
        monkeypatch.setattr(module, name, value)


def measured(app: Any, key: str | None, **options: Any) -> dict[str, float]:
    with running(app, **options) as server:
        host, port = address(server)
        url, pids = f"http://{host}:{port}", [os.getpid()]
        return hostile.measure(url, key=key, pids=pids, count=len(KINDS))


@pytest.mark.parametrize("key", [None, KEY])
def test_our_front_fails_at_no_kind_and_serves_all_others(key):
    access = Access(LIMITS, (digest(key),) if key else ())
    protocol = functools.partial(LimitedProtocol, limits=LIMITS)
    found = measured(Front(engine, access), key, http=protocol)
    assert found["failed"] == 0, found
    assert found["answered"] + found["closed"] == found["hostile"] == len(KINDS)
    assert found["served"] == found["normal"] > 0 and found["alive"] == 1


def test_without_it_kinds_fail_and_are_named(monkeypatch):
    monkeypatch.setattr(hostile_requests, "PATIENCE", 1.0)
    found = measured(engine, None, http="h11")
    kinds = {"admin_routes", "half_headers", "dripping_body", "half_body"}
    assert all(found[f"failed_{kind}"] == 1 for kind in kinds), found
    assert found["failed"] == sum(found.get(f"failed_{k.__name__}", 0) for k in KINDS)
