"""A small HTTP server in a thread, for the page of whatever else goes on.

It ends with the block that opened it, and disturbs nothing: what goes wrong in it stays
in it.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

from jmoe.monitor import web

_END_SECONDS = 3.0
_MAX_CONNECTIONS = 2 * web.MAX_LISTENERS


def open_socket(host: str, port: int, field: str = "monitor") -> socket.socket:
    """Returns a socket that listens there.

    Args:
      field: of the record that has `host` and `port`, for messages.

    Raises:
      ValueError: the port is in use or not for this user, or there is no such address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{field}.host={host!r} can't be used: {error}.") from error
    try:
        # A port is free at once when a server has gone; one that is in use stays so.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(_MAX_CONNECTIONS)
    except OSError as error:
        opened.close()
        raise ValueError(
            f"{field}.port={port} can't be used on {host}: {error.strerror}."
        ) from error
    return opened


@contextlib.contextmanager
def serving(app: Any, listening: socket.socket) -> Iterator[None]:
    """Answers requests by an ASGI app until the block ends.

    Args:
      listening: as `open_socket` returns it; closed at the end.
    """
    import uvicorn

    if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux; connections inherit it
        stall = int(web.STALL_SECONDS * 1000)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listening]}, name="monitor", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_END_SECONDS)
        listening.close()
