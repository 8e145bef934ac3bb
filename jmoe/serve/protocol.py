"""A connection of uvicorn's with what uvicorn has no bounds for.

Those are the time that headers take, the number of connections, and the time that a
client leaves what it was sent unread. The size of headers is h11's to bound, which is
why it is h11's protocol and not httptools'. A connection is never upgraded.
"""

import asyncio
import http
import math
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jmoe.config.serve import LimitsConfig
from jmoe.serve import answers
from jmoe.serve.answers import Refused


class LimitedProtocol(H11Protocol):
    """One connection. With `limits` bound, it is `http=` of `uvicorn.Config`."""

    def __init__(self, config: Any, *arguments: Any, limits: LimitsConfig, **more: Any):
        config.h11_max_incomplete_event_size = limits.header_kib * 1024
        super().__init__(config, *arguments, **more)
        self._limits = limits
        self._headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        _send_at_once(connection)
        self._bound_stalls(connection)
        most = self._limits.connections
        if len(self.connections) > most:
            self._end(
                Refused(503, f"{most} connections are open (limits.connections).")
            )
        else:
            self._start_of_headers()

    def handle_events(self) -> None:
        super().handle_events()
        unfinished = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        if not unfinished or self.transport.is_closing():
            self._headers_due = _cancelled(self._headers_due)
        elif self._headers_due is None:
            self._start_of_headers()

    def _start_of_headers(self) -> None:
        seconds = self._limits.header_seconds
        self._headers_due = self.loop.call_later(seconds, self._headers_are_late)

    def _headers_are_late(self) -> None:
        seconds = self._limits.header_seconds
        self._end(
            Refused(
                408,
                f"The headers weren't there after {seconds:g} s "
                "(limits.header_seconds).",
            )
        )

    def _end(self, refused: Refused) -> None:
        """Answers what isn't a request yet."""
        start, body = answers.start_and_body(refused)
        headers = [*start["headers"], (b"connection", b"close")]
        reason = http.HTTPStatus(refused.status).phrase
        response = h11.Response(
            status_code=refused.status, headers=headers, reason=reason
        )
        data = h11.Data(data=body["body"])
        for event in (response, data, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer has begun
            self.transport.abort()

    def _should_upgrade(self) -> bool:
        return False

    def _bound_stalls(self, connection: Any) -> None:
        """Has the kernel end a connection with bytes that its client doesn't take.

        Transports don't tell: with TLS, what a slow client is sent counts as sent.
        """
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux
            milliseconds = math.ceil(self._limits.stall_seconds * 1000)
            option = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            connection.setsockopt(*option)

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_due = _cancelled(self._headers_due)
        super().connection_lost(exc)


def _send_at_once(connection: socket.socket) -> None:
    """Has the kernel send small pieces without waiting for the client's receipts.

    Those take up to 40 ms. asyncio asks for it only on sockets that name TCP as their
    protocol, and those accepted on a server's name none.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
