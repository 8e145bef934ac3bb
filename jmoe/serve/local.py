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


class Stop:
    """Says that a server is to stop: once, to drain; twice, not to wait."""

    def __init__(self) -> None:
        self.asked, self.hurried = asyncio.Event(), asyncio.Event()

    def __call__(self) -> None:
        (self.hurried if self.asked.is_set() else self.asked).set()


async def serve_until_signalled(
    app: Any, cfg: ServeConfig, access: Access, bound: socket.socket
) -> None:
    """Serves an ASGI app until SIGTERM or Ctrl-C, as `serve_until_stopped` does."""
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await serve_until_stopped(app, cfg, access, bound, stop)


async def serve_until_stopped(
    app: Any, cfg: ServeConfig, access: Access, bound: socket.socket, stop: Stop
) -> None:
    """Serves an ASGI app; once it is to stop, what is in flight is finished.

    Args:
      bound: as `binding.bind` returns it.
    """
    gate = Gate(app)
    server = make_server(gate, cfg, access)
    serving = asyncio.create_task(server.serve([bound]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    print(f"Serving {cfg.name} at {lifecycle.url(cfg)}.", flush=True)
    await stop.asked.wait()
    print(lifecycle.DRAINS, flush=True)
    draining = asyncio.create_task(gate.close(cfg.drain_seconds))
    hurrying = asyncio.create_task(stop.hurried.wait())
    await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    cut_off = draining.result() if draining.done() else await gate.close(0)
    for task in (draining, hurrying):
        task.cancel()
    if cut_off:
        print(f"Cut off {cut_off} requests.", flush=True)
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
        log_config=None,  # another one would close the program's own log
        log_level="error",  # else a line for each hostile request
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        **options,
    )
    return Server(config)
