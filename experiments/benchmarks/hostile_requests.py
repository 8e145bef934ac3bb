"""Hostile requests to a served model, one function a kind.

Each sends one, and returns the status of its answer, CLOSED if the connection ended
without any, or HUNG if it was still open after PATIENCE.
"""

import gzip
import json
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any, NamedTuple

PATIENCE = 120.0  # seconds; a connection that lasts longer would stay for ever
DRIP_SECONDS = 0.2
ENDLESS = 2**28  # bytes; a server that takes them would take any number
COMPLETIONS = "/v1/completions"
CLOSED, HUNG = 0, -1  # in place of a status

ADMIN_ROUTES = (
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/sleep",
    "/wake_up",
    "/pause",
    "/resume",
    "/reset_prefix_cache",
    "/collective_rpc",
    "/start_profile",
    "/update_weights",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/inference/v1/abort_requests",
    "/fault_tolerance/apply",
    "/invocations",
)
UNKNOWN_ROUTES = ("/", "/docs", "/-/routes", "/../etc/passwd", "/%00", "/" + "x" * 8000)
TOO_MUCH: tuple[dict[str, Any], ...] = (
    {"n": 16384},
    {"best_of": 10**9},
    {"max_tokens": 10**12},
    {"logprobs": 10**6},
    {"prompt_logprobs": -1},
    {"prompt": ["x"] * 10_000},
    {"prompt": [[0]] * 10_000},
    {"stop": ["x"] * 100_000},
)
WRONG_TYPES: tuple[dict[str, Any], ...] = (
    {"prompt": 5.5},
    {"prompt": {"a": [None]}},
    {"prompt": [0, "x", None]},
    {"max_tokens": "8"},
    {"n": [1]},
    {"temperature": "hot"},
    {"stream": {"a": 1}},
    {"model": 7},
    {"logit_bias": [1, 2]},
)
NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"0x10", b"--1")


class Target(NamedTuple):
    """Where requests go, and what a normal one has."""

    host: str
    port: int
    tls: bool
    key: str | None
    model: str = ""

    def connect(self) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), timeout=PATIENCE)
        if not self.tls:
            return connection
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(connection)

    def head(self, first: str, *headers: str, key: str | None = None) -> bytes:
        """A request as far as its body, with `key` or that of normal requests."""
        known = [f"{first} HTTP/1.1", f"Host: {self.host}"]
        if key or self.key:
            known.append(f"Authorization: Bearer {key or self.key}")
        return "\r\n".join([*known, *headers, "", ""]).encode("latin-1")

    def post(self, body: Any, *headers: str, key: str | None = None) -> bytes:
        """A whole request for a completion; `body` becomes JSON unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        known = ("Content-Type: application/json", f"Content-Length: {len(data)}")
        return self.head(f"POST {COMPLETIONS}", *known, *headers, key=key) + data

    def asked(self, **changed: Any) -> dict[str, Any]:
        """A normal body, but for what is changed."""
        body = {"model": self.model, "prompt": "The square of 7", "max_tokens": 8}
        return body | {"temperature": 0, "ignore_eos": True} | changed

    def raw(self, value: bytes) -> bytes:
        """A normal body with this in place of its temperature."""
        return json.dumps(self.asked(temperature=None)).encode().replace(b"null", value)


Kind = Callable[[Target, Random], int]


def exchange(target: Target, pieces: Iterable[bytes]) -> int:
    """Sends pieces until there is an answer, whose status it returns."""
    try:
        with target.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
                if select.select([connection], [], [], 0)[0]:
                    break
            return read_status(connection)
    except TimeoutError:
        return HUNG
    except OSError:
        return CLOSED


def read_status(connection: socket.socket) -> int:
    line = b""
    while b"\r\n" not in line:
        piece = connection.recv(2**12)
        if not piece:
            return CLOSED
        line += piece
    return int(line.split(b" ", 2)[1])


def drip(start: bytes, then: bytes) -> Iterator[bytes]:
    """`start`, and then `then` slowly for longer than anybody waits."""
    yield start
    for _ in range(int(PATIENCE / DRIP_SECONDS)):
        time.sleep(DRIP_SECONDS)
        yield then


def endless(start: bytes, piece: bytes) -> Iterator[bytes]:
    yield start
    for _ in range(ENDLESS // len(piece)):
        yield piece


def endless_chunks(target: Target, _: Random) -> int:
    head = target.head(f"POST {COMPLETIONS}", "Transfer-Encoding: chunked")
    return exchange(target, endless(head, b"10000\r\n" + b" " * 2**16 + b"\r\n"))


def endless_length(target: Target, _: Random) -> int:
    head = target.head(f"POST {COMPLETIONS}", f"Content-Length: {10**15}")
    return exchange(target, endless(head, b" " * 2**16))


def endless_headers(target: Target, _: Random) -> int:
    return exchange(
        target, endless(target.head("GET /health")[:-2], b"a: b\r\n" * 2**10)
    )


def giant_header(target: Target, draw: Random) -> int:
    size = draw.choice([2**16, 2**20])
    return exchange(target, [target.head("GET /health", "Padding: " + "x" * size)])


def half_headers(target: Target, draw: Random) -> int:
    whole = target.head("GET /health")
    return exchange(target, [whole[: draw.randrange(len(whole))]])


def dripping_headers(target: Target, _: Random) -> int:
    return exchange(target, drip(target.head("GET /health")[:-2], b"a: b\r\n"))


def half_body(target: Target, draw: Random) -> int:
    whole = target.post(target.asked())
    return exchange(target, [whole[: -draw.randrange(1, 40)]])


def dripping_body(target: Target, _: Random) -> int:
    return exchange(target, drip(target.post(b" " * 10_000)[:-10_000], b" "))


def no_json(target: Target, draw: Random) -> int:
    whole = json.dumps(target.asked()).encode()
    cut = whole[: draw.randrange(1, len(whole))]
    return exchange(target, [target.post(draw.choice([b"", cut, whole + b"]"]))])


def twice_the_same_key(target: Target, _: Random) -> int:
    body = json.dumps(target.asked(n=1)).encode()
    return exchange(target, [target.post(body[:-1] + b', "n": 16384}')])


def deep_nesting(target: Target, draw: Random) -> int:
    times = draw.choice([500, 100_000])
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    value = opening * times + b"1" + closing * times
    return exchange(target, [target.post(target.raw(value))])


def wrong_types(target: Target, draw: Random) -> int:
    return exchange(target, [target.post(target.asked(**draw.choice(WRONG_TYPES)))])


def too_much(target: Target, draw: Random) -> int:
    return exchange(target, [target.post(target.asked(**draw.choice(TOO_MUCH)))])


def no_numbers(target: Target, draw: Random) -> int:
    return exchange(target, [target.post(target.raw(draw.choice(NUMBERS)))])


def bad_encodings(target: Target, draw: Random) -> int:
    text = json.dumps(target.asked())
    squeezed = gzip.compress(text.encode())
    bad = [text.encode("utf-16"), text.encode().replace(b"7", b"\xff"), squeezed]
    return exchange(target, [target.post(draw.choice(bad), "Content-Encoding: gzip")])


def unknown_routes(target: Target, draw: Random) -> int:
    path, method = draw.choice(UNKNOWN_ROUTES), draw.choice(["GET", "POST"])
    return exchange(target, [target.head(f"{method} {path}", "Content-Length: 0")])


def admin_routes(target: Target, draw: Random) -> int:
    path, method = draw.choice(ADMIN_ROUTES), draw.choice(["GET", "POST"])
    return exchange(target, [target.head(f"{method} {path}", "Content-Length: 0")])


def other_methods(target: Target, draw: Random) -> int:
    method = draw.choice(["DELETE", "PUT", "OPTIONS", "TRACE", "CONNECT", "XYZ"])
    return exchange(target, [target.head(f"{method} {COMPLETIONS}")])


def wrong_keys(target: Target, draw: Random) -> int:
    key = draw.choice(["wrong", "x" * 5000, "\xff" * 16, f"{target.key}x"])
    path = draw.choice(["/metrics", "/v1/models"] if target.key else ["/none"])
    return exchange(target, [target.head(f"GET {path}", key=key)])


def garbage(target: Target, draw: Random) -> int:
    tls_hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    kinds = [tls_hello, http2, draw.randbytes(2**14), b"\r\n" * 2**10, b"GET\r\n\r\n"]
    return exchange(target, [draw.choice(kinds)])


def two_lengths(target: Target, draw: Random) -> int:
    second = ["Content-Length: 5", "Transfer-Encoding: chunked", "Content-Length: -1"]
    return exchange(target, [target.post(b"{}", draw.choice(second))])


def pipelined_garbage(target: Target, draw: Random) -> int:
    """Follows a normal request, so that only its connection's end is looked at."""
    try:
        with target.connect() as connection:
            connection.sendall(target.head("GET /health") + draw.randbytes(2**12))
            while connection.recv(2**16):
                pass
    except TimeoutError:
        return HUNG
    except OSError:
        pass
    return CLOSED


def upgrade(target: Target, _: Random) -> int:
    headers = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    return exchange(target, [target.head("GET /v1/realtime", *headers, key)])


def early_leave(target: Target, draw: Random) -> int:
    """Leaves before the end of a request, or of a long answer."""
    orders = ("x-request-disconnect-disabled: ?1", "x-request-timeout-seconds: 0")
    whole = target.post(target.asked(max_tokens=900, stream=True), *orders)
    with target.connect() as connection:
        connection.sendall(whole[: draw.choice([50, -20, len(whole)])])
        connection.settimeout(draw.random())
        try:
            connection.recv(2**10)
        except OSError:
            pass
    return CLOSED


KINDS: tuple[Kind, ...] = (
    endless_chunks,
    endless_length,
    endless_headers,
    giant_header,
    half_headers,
    dripping_headers,
    half_body,
    dripping_body,
    no_json,
    twice_the_same_key,
    deep_nesting,
    wrong_types,
    too_much,
    no_numbers,
    bad_encodings,
    unknown_routes,
    admin_routes,
    other_methods,
    wrong_keys,
    garbage,
    two_lengths,
    pipelined_garbage,
    upgrade,
    early_leave,
)
