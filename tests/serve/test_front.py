"""Who may ask what, without a network."""

import functools
import time

import pytest

from jmoe.config import override
from jmoe.config.serve import LimitsConfig, ServeConfig
from jmoe.serve import front
from jmoe.serve.front import ROUTES, Access, Front, digest
from tests.serve.asgi import Answer, ask

KEYS = ("first-key-of-tests", "second-key-of-tests")
COMPLETIONS = "/v1/completions"
LIMITS = LimitsConfig(header_kib=1, body_kib=1, body_seconds=0.2)
OPEN = Access(LIMITS)
LOCKED = Access(LIMITS, tuple(map(digest, KEYS)), ("/health",))


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(front, "LINGER_SECONDS", 0.1)


def answer(access: Access, *arguments, **named) -> Answer:
    found = ask(functools.partial(Front, access=access), *arguments, **named)
    assert found is not None
    return found


def post(access: Access, body, key: str | None = None, **headers: str) -> Answer:
    given = {} if key is None else {"authorization": f"Bearer {key}"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return answer(access, "POST", COMPLETIONS, body, headers=given | named)


def test_each_route_is_reached_by_its_own_method_only():
    for path, method in ROUTES.items():
        assert answer(OPEN, method, path, b"{}").body == b"inside"
        for other in {"GET", "POST", "OPTIONS", "DELETE", "HEAD"} - {method}:
            refused = answer(OPEN, other, path, b"{}")
            assert (refused.status, refused.headers["allow"]) == (405, method)


@pytest.mark.parametrize(
    "path",
    [
        "/scale_elastic_ep",
        "/sleep",
        "/wake_up",
        "/pause",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/inference/v1/abort_requests",
        "/v1/responses",
        "/tokenize",
        "/invocations",
        "/docs",
        "/-/routes",
        "/",
        "/health/",
        "//health",
        "/HEALTH",
        "/v1/completions/render",
    ],
)
def test_no_other_route_reaches_the_engine(path):
    for method in ("GET", "POST"):
        refused = answer(OPEN, method, path, b"{}")
        assert refused.status == 404 and not refused.passed
        assert "/v1/completions" in refused.error


def test_each_key_opens_and_nothing_else_does():
    for key in KEYS:
        assert post(LOCKED, b"{}", key).status == 200
    wrong = [None, "", KEYS[0][:-1], KEYS[0] + "x", LOCKED.digests[0], "schlüssel"]
    for key in wrong:
        refused = post(LOCKED, b"{}", key)
        assert (refused.status, refused.passed) == (401, [])
        assert refused.headers["www-authenticate"] == "Bearer"
    assert post(LOCKED, b"{}", authorization=f"Basic {KEYS[0]}").status == 401


def test_only_open_routes_need_no_key_and_others_are_not_even_named():
    assert answer(LOCKED, "GET", "/health").status == 200
    for path in ("/metrics", "/v1/models", "/sleep"):
        assert answer(LOCKED, "GET", path).status == 401
    both = LOCKED._replace(open_routes=("/health", "/metrics"))
    assert answer(both, "GET", "/metrics").status == 200


def test_a_key_and_what_ray_obeys_in_headers_stay_outside():
    orders = {
        "x_request_disconnect_disabled": "?1",
        "x_request_timeout_seconds": "0",
        "serve_multiplexed_model_id": "x",
        "content_type": "application/json",
    }
    ((scope, body),) = post(LOCKED, [b"{", b"}"], KEYS[0], **orders).passed
    expected = {b"content-type": b"application/json", b"content-length": b"2"}
    assert (dict(scope["headers"]), body) == (expected, b"{}")
    assert scope["query_string"] == b""


def test_headers_that_came_at_once_are_bounded_too():
    for headers in ({"a": "x" * 2048}, {f"a{i}": "x" * 20 for i in range(100)}):
        assert answer(OPEN, "GET", "/health", headers=headers).status == 431
    assert answer(OPEN, "GET", "/" + "x" * 2048).status == 431


def test_a_body_is_counted_as_it_comes_whatever_its_headers_say():
    def endless():
        for _ in range(5):
            yield b" " * 300
        yield 60.0  # what nobody waits for

    began = time.monotonic()
    for headers in ({}, {"content_length": "12"}):
        refused = post(OPEN, endless(), **headers)
        assert (refused.status, refused.headers["connection"]) == (413, "close")
        assert refused.error == "The body has more than 1 KiB (limits.body_kib)."
    assert time.monotonic() - began < 30
    assert post(OPEN, b"{" + b" " * 1022 + b"}").status == 200


def test_a_body_that_says_it_is_too_long_is_not_waited_for():
    assert post(OPEN, [60.0, b"{}"], content_length="1025").status == 413


def test_a_slow_body_is_given_up():
    refused = post(OPEN, [b"{", 60.0, b"}"])
    assert (refused.status, refused.passed) == (408, [])
    assert "after 0.2 s (limits.body_seconds)" in refused.error


def test_a_client_that_leaves_has_no_request():
    wrapped = functools.partial(Front, access=OPEN)
    assert ask(wrapped, "POST", COMPLETIONS, b"{}", leaves=True) is None


def test_what_the_body_asks_for_is_checked_on_both_routes_for_answers():
    for path in (COMPLETIONS, "/v1/chat/completions"):
        refused = answer(OPEN, "POST", path, b'{"n": 16384}')
        assert (refused.status, refused.passed) == (400, [])
        assert refused.error == "n=16384 must be at most 16 (limits.choices)."
        assert "connection" not in refused.headers


def test_access_travels_as_json_that_holds_no_key():
    settings = ["limits.new_tokens=7", "open_routes=['/metrics']"]
    cfg = override(ServeConfig(), settings)
    access = Access(cfg.limits, LOCKED.digests, cfg.open_routes)
    assert Access.from_json(access.to_json()) == access
    assert not any(key in access.to_json() for key in KEYS)
