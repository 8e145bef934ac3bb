"""A small HTTP server in a thread, for the page of whatever else goes on.

It ends with the block that opened it, and disturbs nothing: what goes wrong in it stays
in it.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from jmoe.config import MonitorConfig
from jmoe.monitor import binding
from jmoe.monitor.snapshot import Snapshot

_END_SECONDS = 3.0
_STALL_SECONDS = 30
_CONNECTIONS = 64
_LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")


class Watched(Protocol):
    """What a page is about."""

    def snapshot(self) -> Snapshot: ...

    def prometheus(self) -> bytes: ...


def check(cfg: MonitorConfig) -> None:
    """Raises ValueError as `opened` does, if it would; changes nothing."""
    if cfg.port is not None:
        _libraries()
        _listen(cfg).close()


@contextlib.contextmanager
def opened(cfg: MonitorConfig, watched: Watched) -> Iterator[str]:
    """Shows what is watched until the block ends.

    Yields:
      The page's address; "" if there is to be none.

    Raises:
      ValueError: the port is in use or not for this user, the host isn't this machine,
        or a library isn't installed.
    """
    if cfg.port is None:
        yield ""
        return
    uvicorn, web = _libraries()
    listening = _listen(cfg)
    # A page from elsewhere, whose name suddenly means this machine, gets no answer.
    hosts = _LOCAL if cfg.host in _LOCAL else ("*",)
    app = web.make_app(watched.snapshot, watched.prometheus, hosts=hosts)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listening]}, name="monitor", daemon=True
    )
    thread.start()
    host, port = listening.getsockname()[:2]
    try:
        yield f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    finally:
        server.should_exit = True
        thread.join(_END_SECONDS)
        listening.close()


def _listen(cfg: MonitorConfig) -> socket.socket:
    assert cfg.port is not None, "see `opened`"
    listening = binding.bind(cfg.host, cfg.port, "monitor.")
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux; connections inherit it
        stall = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALL_SECONDS * 1000
        listening.setsockopt(*stall)
    listening.listen(_CONNECTIONS)
    return listening


def _libraries() -> tuple[Any, Any]:
    """Returns uvicorn and `jmoe.monitor.web`, which only a page needs."""
    try:
        import prometheus_client  # noqa: F401
        import uvicorn

        from jmoe.monitor import web
    except ModuleNotFoundError as missing:
        raise ValueError(
            f'monitor.port needs more: {missing}. pip install "jmoe[monitor]" has it.'
        ) from missing
    return uvicorn, web
