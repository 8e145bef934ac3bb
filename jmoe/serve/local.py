"""Our engine's application on uvicorn, in this process: one machine needs no Ray."""

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from jmoe.config import checks
from jmoe.config.serve import ServeConfig
from jmoe.serve import lifecycle
from jmoe.serve.front import Access, Front
from jmoe.serve.lifecycle import Gate
from jmoe.serve.protocol import LimitedProtocol

CLOSE_SECONDS = 1  # that who only looks may stay, once nobody is answered


class Server(uvicorn.Server):
    """A server that leaves signals to who runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_until_stopped(
    app: Any, cfg: ServeConfig, access: Access, bound: socket.socket
) -> None:
    """Serves an ASGI app until SIGTERM or Ctrl-C; then what is in flight is finished.

    A second signal doesn't wait.

    Args:
      bound: as `lifecycle.bind` returns it.
    """
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    gate = Gate(app)
    server = make_server(gate, cfg, access)
    serving = asyncio.create_task(server.serve([bound]))
    print(f"Serving {cfg.name} at {lifecycle.url(cfg)}.", flush=True)
    await stop.wait()
    print(lifecycle.DRAINS, flush=True)
    draining = asyncio.create_task(gate.close(cfg.drain_seconds))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    cut_off = await (draining if draining.done() else gate.close(0))
    draining.cancel()
    if cut_off:
        print(f"Cut off {cut_off} requests after {cfg.drain_seconds:g} s.")
    server.should_exit = True
    await serving
    print("Stopped.", flush=True)


def make_server(app: Any, cfg: ServeConfig, access: Access) -> Server:
    """Returns a server of the app behind our front, by our protocol."""
    protocol: Any = functools.partial(LimitedProtocol, limits=access.limits)
    options: dict[str, Any] = {}
    if cfg.tls_certificate is not None and cfg.tls_key is not None:
        certificate = checks.local_path("tls_certificate", cfg.tls_certificate)
        key = checks.local_path("tls_key", cfg.tls_key)
        options = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    config = uvicorn.Config(
        Front(app, access),
        http=protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        **options,
    )
    return Server(config)
