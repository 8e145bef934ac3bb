"""A uvicorn in a thread of the test's process."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from jmoe.serve import front

PATIENCE = 60  # seconds; a test that needs them has failed


@contextlib.contextmanager
def running(app: Any, **options: Any) -> Iterator[uvicorn.Server]:
    """Serves `app` on a free port; refused clients are soon done with.

    Its socket is bound first, and names no protocol, as that of our own server.
    """
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        log_config=None,  # another one would close what pytest captures
        log_level="critical",
        timeout_keep_alive=PATIENCE,
        **options,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=asyncio.run, args=[server.serve([bound])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front, "LINGER_SECONDS", 0.1)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield server
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def address(server: uvicorn.Server) -> tuple[str, int]:
    return server.servers[0].sockets[0].getsockname()


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
