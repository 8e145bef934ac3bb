"""Connections to a real uvicorn that isn't behind anything."""

import asyncio
import functools
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from jmoe.config.serve import LimitsConfig
from jmoe.serve import front
from jmoe.serve.front import Access, Front
from jmoe.serve.protocol import LimitedProtocol
from tests.serve.running import PATIENCE, address, running, wait_until
from tests.serve.tls import certificate

LIMITS = LimitsConfig(
    connections=8, header_kib=4, header_seconds=0.3, body_seconds=0.3, stall_seconds=2
)
ASK = b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n"
LARGE = 2**24  # bytes, more than any socket's buffer


async def engine(scope, receive, send) -> None:
    """Answers /health at once and /metrics with more than a socket holds."""
    size = LARGE if scope["path"] == "/metrics" else 2
    headers = [(b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"x" * size})


class Upgraded(asyncio.Protocol):
    """What uvicorn makes of a connection that becomes another protocol."""

    def __init__(self, **_):
        pass

    def connection_made(self, transport: Any) -> None:
        transport.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        transport.close()


@pytest.fixture(scope="module", params=["http", "https"])
def server(request, tmp_path_factory) -> Iterator[uvicorn.Server]:
    files = {}
    if request.param == "https":
        path = certificate(tmp_path_factory.mktemp("tls"), "own")
        files = {"ssl_certfile": f"{path}.pem", "ssl_keyfile": f"{path}.key"}
    http: Any = functools.partial(LimitedProtocol, limits=LIMITS)
    app = Front(engine, Access(LIMITS))
    with running(app, http=http, ws=Upgraded, **files) as server:
        yield server


@pytest.fixture
def connect(server):
    """Opens a connection that sends these bytes; all are closed at the end."""
    opened: list[socket.socket] = []

    def connect(sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(address(server), timeout=PATIENCE)
        if server.config.is_ssl:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = context.wrap_socket(connection)
        opened.append(connection)
        connection.sendall(sent)
        return connection

    yield connect
    for connection in opened:
        connection.close()
    wait_until(lambda: not server.server_state.connections)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = bytearray()
    try:
        while piece := connection.recv(2**16):
            received += piece
    except (ConnectionResetError, ssl.SSLEOFError):
        pass
    return bytes(received)


def read_answer(connection: socket.socket) -> None:
    received = b""
    while not received.endswith(b"xx"):
        piece = connection.recv(2**16)
        assert piece, f"closed after {received!r}"
        received += piece


@pytest.mark.parametrize("sent", [b"", b"GET /hea", ASK[:-2]])
def test_headers_that_do_not_come_end_a_connection(connect, sent):
    assert b" 408 " in rest(connect(sent)).splitlines()[0]


def test_headers_that_drip_end_a_connection_that_has_been_answered_before(connect):
    connection = connect(ASK)
    read_answer(connection)
    time.sleep(2 * LIMITS.header_seconds)  # doing nothing is no half of a request
    with pytest.raises(OSError):
        while True:
            connection.sendall(b"G")
            time.sleep(0.05)


def test_pipelined_requests_are_answered_and_half_of_one_is_not_waited_for(connect):
    received = rest(connect(ASK + ASK + ASK[:9]))
    assert (received.count(b" 200 "), received.count(b" 408 ")) == (2, 1)


def test_small_pieces_leave_without_waiting_for_the_clients_receipts(server, connect):
    connect()
    wait_until(lambda: server.server_state.connections)
    (protocol,) = server.server_state.connections
    kept = protocol.transport.get_extra_info("socket")
    assert kept.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    "sent",
    [
        ASK[:-2] + b"a: " + b"x" * 5000,
        ASK[:-2] + b"a: b\r\n" * 1000,
        b"GET /" + b"x" * 5000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
        ASK[:-2] + b"content-length: x\r\n\r\n",
    ],
)
def test_headers_too_long_or_no_headers_are_refused(connect, sent):
    assert rest(connect(sent)).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "framing", [b"content-length: 99", b"transfer-encoding: chunked"]
)
def test_a_body_that_does_not_come_ends_a_connection(connect, framing):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\n" + framing + b"\r\n\r\n"
    assert rest(connect(head)).startswith(b"HTTP/1.1 408 ")


def test_garbage_after_a_request_ends_its_connection_only(connect):
    received = rest(connect(ASK + b"\x00garbage\r\n\r\n"))
    assert (received.count(b" 200 "), received.count(b" 400 ")) == (1, 1)
    assert connect(ASK).recv(12) == b"HTTP/1.1 200"


def test_garbage_once_an_answer_has_begun_ends_its_connection_quietly(
    connect, caplog, monkeypatch
):
    monkeypatch.setattr(front, "LINGER_SECONDS", PATIENCE)
    chunked = b"host: here\r\ntransfer-encoding: chunked\r\n\r\n"
    connection = connect(b"POST /none HTTP/1.1\r\n" + chunked)
    assert connection.recv(12) == b"HTTP/1.1 404"
    connection.sendall(b"no chunk\r\n")
    rest(connection)
    assert not caplog.records


def test_no_connection_becomes_another_protocol(connect):
    upgrade = (
        b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    )
    sent = ASK[:-2].replace(b"/health", b"/v1/realtime") + upgrade + b"\r\n"
    assert rest(connect(sent)).startswith(b"HTTP/1.1 404 ")


def test_a_client_that_reads_nothing_is_let_go(server, connect):
    connect(ASK.replace(b"/health", b"/metrics"))
    wait_until(lambda: server.server_state.connections)
    wait_until(lambda: not server.server_state.connections)


def test_a_client_that_reads_gets_all_of_it(connect):
    connection = connect(ASK.replace(b"/health", b"/metrics"))
    received = 0
    while received < LARGE:
        piece = connection.recv(2**20)
        assert piece, f"closed after {received} bytes"
        received += len(piece)


def test_one_connection_too_many_is_told_so_and_others_go_on(connect):
    within = [connect(ASK) for _ in range(LIMITS.connections)]
    for connection in within:  # idle from then on, and open
        read_answer(connection)
    assert b" 503 " in rest(connect())
    within[0].sendall(ASK)
    assert within[0].recv(12) == b"HTTP/1.1 200"
