"""Where process 0 listens: who comes must prove that it is a process of the run.

Each connection has a thread and a few seconds of its own, so that one that says
nothing, or a byte now and then, keeps nobody waiting. It listens at the coordinator's
address and no other of this host's.

A process comes to meet the others (`jmoe.parallel.rendezvous`), and again for each
connection that JAX opens to its coordination service, which itself knows no secret and
ends a process by SIGABRT when process 0's end of a connection closes. So the service
listens on the loopback alone, and its connections go through here, from each host's
loopback. Their far end stays open when this one closes: until the process has been told
who is missing.
"""

import contextlib
import ipaddress
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jmoe.parallel.channel import AuthenticationError, Channel, challenge

_BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_LOOPBACK = "127.0.0.1"
_MAX_HANDSHAKES = 512  # at once
_RETRY_S = 0.05
_SERVICE_S = 300.0  # for JAX's service to listen
_LISTED_STRANGERS = 4


class Listener:
    """Listens until it is closed."""

    def __init__(self, address: str, secret: bytes):
        """Raises OSError if it can't listen there."""
        self._secret = secret
        self._arrived: queue.SimpleQueue[tuple[dict[str, Any], Channel]]
        self._arrived = queue.SimpleQueue()
        self._free = threading.Semaphore(_MAX_HANDSHAKES)
        self._strangers: set[str] = set()
        self._refusal: str | None = None
        self._service_port: int | None = None
        self._sockets = _listen(address)
        for server in self._sockets:
            _in_background(self._accept, server)

    def next_process(self, timeout_s: float) -> tuple[dict[str, Any], Channel] | None:
        """Returns what a process that has come says of itself, and a channel to it.

        None if none has come in time.
        """
        try:
            return self._arrived.get(timeout=max(timeout_s, 1e-3))
        except queue.Empty:
            return None

    def refuse_more(self, reason: str) -> None:
        """Tells whoever comes to meet the others from now on why it can't."""
        self._refusal = reason

    def strangers(self) -> str:
        """Returns a sentence about those not let in; "" if there were none."""
        if not self._strangers:
            return ""
        hosts = sorted(self._strangers)
        shown = ", ".join(hosts[:_LISTED_STRANGERS])
        more = ", ..." if len(hosts) > _LISTED_STRANGERS else ""
        return f" Connections without the run's secret came from {shown}{more}."

    def open_service(self) -> str:
        """Returns the address at which JAX's service is to listen, on the loopback."""
        with socket.create_server((_LOOPBACK, 0)) as probe:
            self._service_port = probe.getsockname()[1]
        return f"{_LOOPBACK}:{self._service_port}"

    def close(self) -> None:
        for server in self._sockets:
            _close(server)
        while (arrived := self.next_process(0)) is not None:
            arrived[1].close()

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                connection, (host, *_) = server.accept()
                self._free.acquire()
                _in_background(self._welcome, connection, host)

    def _welcome(self, connection: socket.socket, host: str) -> None:
        try:
            channel = Channel(connection)
            hello = challenge(channel, self._secret)
        except (AuthenticationError, OSError):
            self._strangers.add(host)
            connection.close()
            return
        finally:
            self._free.release()
        if hello["purpose"] == "jax":
            self._to_service(channel)
        elif self._refusal is None:
            self._arrived.put((hello, channel))
        else:
            channel.send({"error": self._refusal, "kind": "ValueError"})
            channel.close()

    def _to_service(self, channel: Channel) -> None:
        """Connects it to JAX's service, which may not have started yet."""
        deadline = time.monotonic() + _SERVICE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                place = (_LOOPBACK, self._service_port)
                service = socket.create_connection(place)
                _relay(service, *channel.take_over(), True)
                return
            time.sleep(_RETRY_S)
        channel.close()


class Forwarder:
    """A loopback address that leads to process 0, by a channel of its own each time."""

    def __init__(self, reach: Callable[[], Channel]):
        """`reach` opens such a channel."""
        self._reach = reach
        self._listener = socket.create_server((_LOOPBACK, 0))
        self.address = f"{_LOOPBACK}:{self._listener.getsockname()[1]}"
        self._unanswered: list[socket.socket] = []  # they stay open
        _in_background(self._accept)

    def close(self) -> None:
        _close(self._listener)
        for local in self._unanswered:
            local.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                local, _ = self._listener.accept()
                try:
                    channel = self._reach()
                except (OSError, ValueError):  # process 0 is gone
                    self._unanswered.append(local)
                else:
                    _in_background(_relay, local, *channel.take_over(), False)


def _relay(local: socket.socket, remote: socket.socket, first: bytes, ends: bool):
    """Makes two connections one, until both have ended.

    Args:
      first: what has come from `remote` already.
      ends: whether `local` learns that `remote` has ended.
    """
    with local, remote:
        there = threading.Thread(target=_pass_on, args=(local, remote), daemon=True)
        there.start()
        with contextlib.suppress(OSError):
            local.sendall(first)
        _pass_on(remote, local, ends)
        there.join()
        with contextlib.suppress(OSError):
            while not ends and local.recv(1 << 16):
                pass


def _pass_on(source: socket.socket, target: socket.socket, ends: bool = True) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)
    if ends:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def _close(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)  # wakes who accepts
    server.close()


def _in_background(function: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port; ValueError if it isn't host:port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"coordinator={address!r} must read host:port.")
    return host.strip("[]"), int(port)


def _listen(address: str) -> list[socket.socket]:
    """Listens at each of the addresses that the coordinator's name has here.

    As for JAX, an environment variable may say where else, on a host that others know
    by an address that it doesn't have.
    """
    host, port = split_address(address)
    bound = os.environ.get(_BIND)
    if bound:
        host, port = split_address(bound)
    servers: list[socket.socket] = []
    try:
        for family, place in dict.fromkeys(_own_places(host, port)):
            servers.append(socket.create_server(place, family=family))
    except OSError as error:
        for server in servers:
            server.close()
        raise OSError(
            f"coordinator={address!r}: process 0 can't listen there: {error}. If the "
            f"others know this host by an address that it doesn't have itself, {_BIND} "
            "says where to listen."
        ) from error
    return servers


def _own_places(host: str, port: int) -> Iterator[tuple[int, tuple]]:
    """Yields families and addresses of the sockets to open.

    Many hosts know their own name as the loopback only, by which nobody else could
    reach them: such a name stands for all of a host's addresses.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = [
        ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found
    ]
    is_name = host not in map(str, hosts) and host != "localhost"
    if is_name and all(address.is_loopback for address in hosts):
        yield socket.AF_INET, ("0.0.0.0", port)
        if socket.has_dualstack_ipv6():
            yield socket.AF_INET6, ("::", port)
        return
    for family, *_, place in found:
        yield family, place
