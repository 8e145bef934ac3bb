"""How Ray Serve's HTTP proxies, one a machine, come to stand behind our `front`.

Ray makes its proxies itself, with an app and a protocol of its own. It has one hook for
middleware: a function named by an environment variable, called in each proxy before it
listens. There we also put our protocol in the place of uvicorn's default, as Ray's
options have nothing for headers. `refuse_unguarded` asks a proxy whether it worked.
"""
# pyright: reportMissingImports=false

import functools
import os
import socket
import ssl
import time
from typing import Any

from jmoe.config import checks
from jmoe.config.serve import ServeConfig
from jmoe.serve.front import Access, Front

HOOK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ACCESS = "JMOE_SERVE_ACCESS"  # has digests of keys, and no key
START_SECONDS = 60.0  # that a proxy may take to listen


def environment(access: Access) -> dict[str, str]:
    """Returns the environment of Ray Serve's controller, which proxies inherit."""
    return {
        HOOK: f"{__name__}.{put_front.__name__}",
        ACCESS: access.to_json(),
        "RAY_SERVE_ENABLE_HA_PROXY": "0",  # another proxy, which has no hook
        # On a busy machine a proxy takes longer than Ray gives it by default, 5 s.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": f"{START_SECONDS}",
    }


def put_front() -> list[Any]:
    """Returns Starlette middleware; Ray calls it in a proxy."""
    import uvicorn.config
    from starlette.middleware import Middleware

    from jmoe.serve.protocol import LimitedProtocol

    access = Access.from_json(os.environ[ACCESS])
    protocol: Any = functools.partial(LimitedProtocol, limits=access.limits)
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol
    return [Middleware(Front, access)]


def http_options(cfg: ServeConfig) -> dict[str, Any]:
    """Returns arguments of Ray Serve's HTTPOptions."""
    options: dict[str, Any] = {"host": cfg.host, "port": cfg.port}
    if cfg.tls_certificate is not None and cfg.tls_key is not None:
        certificate = checks.local_path("tls_certificate", cfg.tls_certificate)
        key = checks.local_path("tls_key", cfg.tls_key)
        options["ssl_certfile"] = str(certificate.absolute())
        options["ssl_keyfile"] = str(key.absolute())
    return options


def refuse_unguarded(cfg: ServeConfig) -> None:
    """Asks a proxy for what only our front and our protocol refuse.

    Raises:
      RuntimeError: one of them isn't there, as with a Ray that has no such hook.
    """
    answer = _ask(cfg, b"GET / HTTP/1.1\r\nhost: here\r\n\r\n", b"error")
    if not answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 404 ")):
        raise RuntimeError(f"Ray's proxy isn't behind jmoe's front: {answer!r}.")
    endless = b"GET / HTTP/1.1\r\n" + b"x" * cfg.limits.header_kib * 1024
    answer = _ask(cfg, endless, b"HTTP")
    if not answer.startswith(b"HTTP/1.1 400 "):
        raise RuntimeError(f"Ray's proxy takes headers of any size: {answer!r}.")


def _ask(cfg: ServeConfig, sent: bytes, until: bytes) -> bytes:
    """Returns the answer as far as `until`, or what came in START_SECONDS."""
    received = b""
    deadline = time.monotonic() + START_SECONDS
    while until not in received and time.monotonic() < deadline:
        received = b""
        try:
            with _connect(cfg) as connection:
                connection.sendall(sent)
                while until not in received and (piece := connection.recv(2**16)):
                    received += piece
        except OSError:  # it doesn't listen yet
            time.sleep(0.1)
    return received


def _connect(cfg: ServeConfig) -> socket.socket:
    address = (cfg.host, cfg.port)
    connection = socket.create_connection(address, timeout=START_SECONDS)
    if cfg.tls_certificate is None:
        return connection
    # It is this machine's own, and its name may be another than the certificate's.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection)
