"""Connections between processes of one run, each of which has proved that it is one.

A channel carries JSON values. It begins with a challenge each way: each end sends a
random number and answers the other's by HMAC-SHA256 (RFC 2104) under the run's secret,
which is never sent. A stranger can't answer and, as its answer holds both numbers,
can't repeat one that it has heard. What follows isn't encrypted: who can alter a
network's packets isn't kept out.
"""

import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import secrets
import select
import socket
import stat
import time
from collections.abc import Mapping
from typing import Any

SECRET = "JMOE_SECRET"
HANDSHAKE_S = 5.0
_MAX_STRANGER = 4096  # bytes of a message before the other end has proved anything
_MAX_MESSAGE = 64 << 20
_SHORTEST_SECRET = 16
# A host without power or network is noticed after about 30 s.
_KEEP_ALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 30_000,  # ms, for what was sent and isn't acknowledged
}


class AuthenticationError(ValueError):
    """The other end isn't a process of this run."""


class Channel:
    """One end of a connection: JSON values, one a line. One thread may receive."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not everywhere
                number = getattr(socket, name)
                connection.setsockopt(socket.IPPROTO_TCP, number, value)
        self.connection = connection
        self._received = bytearray()

    def send(self, value: Any) -> None:
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, limit: int = _MAX_MESSAGE, deadline: float | None = None) -> Any:
        """Returns the next value.

        Args:
          deadline: when the whole of it must be there, by `time.monotonic`.

        Raises:
          ConnectionError: the other end has closed the connection.
          TimeoutError: it was not there by the deadline.
          ValueError: it isn't JSON, or is longer than `limit`.
        """
        seen = 0
        while (end := self._received.find(b"\n", seen)) < 0:
            seen = len(self._received)
            if seen > limit:
                raise ValueError(f"A message is longer than {limit} bytes.")
            if deadline is not None:
                self.connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self.connection.recv(1 << 16)
            if not part:
                raise ConnectionError("closed")
            self._received += part
        message = bytes(self._received[:end])
        del self._received[: end + 1]
        return json.loads(message)

    def has_ended(self) -> bool:
        """Returns whether the other end is gone, unless it has something to say."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except ConnectionError:
            return True

    def take_over(self) -> tuple[socket.socket, bytes]:
        """Returns the connection, and what has come of bytes that are no message."""
        self.connection.settimeout(None)
        return self.connection, bytes(self._received)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end may have closed it
            self.connection.shutdown(socket.SHUT_RDWR)  # wakes who waits for a message
        self.connection.close()


def challenge(channel: Channel, secret: bytes) -> Any:
    """Returns how the other end introduces itself, once it has proved the secret.

    Raises:
      AuthenticationError: it has not, or has sent something else or too much.
      OSError: it has ended, or taken longer than HANDSHAKE_S.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    mine = secrets.token_hex(32)
    channel.send({"jmoe": mine})
    answer = _fields(channel, deadline, "hello", "nonce", "proof")
    content = [mine, answer["nonce"], answer["hello"]]
    if not _proves(answer["proof"], secret, "other", content):
        channel.send({"refused": "It has another secret."})
        raise AuthenticationError("It has another secret.")
    channel.send({"proof": _proof(secret, "first", content)})
    channel.connection.settimeout(None)
    return answer["hello"]


def answer_challenge(channel: Channel, secret: bytes, hello: Mapping[str, Any]) -> None:
    """Proves the secret to the end that challenges, and has it prove it in return.

    Raises:
      AuthenticationError: it has another secret, or is something else.
      OSError: as for `challenge`.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    nonce = secrets.token_hex(32)
    content = [_fields(channel, deadline, "jmoe")["jmoe"], nonce, dict(hello)]
    proof = _proof(secret, "other", content)
    channel.send({"hello": hello, "nonce": nonce, "proof": proof})
    answer = _fields(channel, deadline)
    if not _proves(answer.get("proof"), secret, "first", content):
        raise AuthenticationError("It has another secret.")
    channel.connection.settimeout(None)


def read_secret(environ: Mapping[str, str] = os.environ) -> bytes:
    """Returns what only the processes of a user's runs know.

    JMOE_SECRET if it is set; otherwise a file in the user's configuration, which is
    made when it is first needed: one for all hosts that share the home directory.

    Raises:
      ValueError: the variable is too short, or others can read the file.
      OSError: the file can't be made or read.
    """
    given = environ.get(SECRET)
    if given is None:
        return _kept_secret(environ)
    if len(given) < _SHORTEST_SECRET:
        raise ValueError(
            f"{SECRET} has {len(given)} characters; it must have {_SHORTEST_SECRET} "
            "at least, such as from `openssl rand -hex 32`."
        )
    return os.fsencode(given)


def _kept_secret(environ: Mapping[str, str]) -> bytes:
    home = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    path = pathlib.Path(home) / "jmoe" / "secret"
    try:
        if not path.exists():
            _make_secret(path)
        with path.open("rb") as file:
            found, secret = os.fstat(file.fileno()), file.read()
    except OSError as error:
        raise OSError(
            f"Several processes need a secret. {SECRET} isn't set, and {path} can't "
            f"be used: {error}."
        ) from error
    if stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid != os.getuid():
        raise ValueError(f"{path} must be its user's own, with mode 0600.")
    if len(secret) < _SHORTEST_SECRET:
        raise ValueError(f"{path} holds no secret; remove it to have it made again.")
    return secret


def _make_secret(path: pathlib.Path) -> None:
    """Writes a secret whole or not at all; of several at once, the first one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"secret.{socket.gethostname()}.{os.getpid()}")
    with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(own, path)
    own.unlink()


def _fields(channel: Channel, deadline: float, *names: str) -> dict[str, Any]:
    """Returns an object that has these fields, from an end that has proved nothing."""
    try:
        message = channel.receive(_MAX_STRANGER, deadline)
    except (ValueError, RecursionError) as error:
        raise AuthenticationError(str(error)) from error
    if not isinstance(message, dict) or not set(names) <= set(message):
        raise AuthenticationError("It says something else.")
    return message


def _proof(secret: bytes, side: str, content: list[Any]) -> str:
    """Returns a proof of `content`.

    The side keeps one end's answer from being the other's.
    """
    text = json.dumps([side, *content], sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _proves(answer: Any, secret: bytes, side: str, content: list[Any]) -> bool:
    expected = _proof(secret, side, content)
    return isinstance(answer, str) and hmac.compare_digest(
        answer.encode(errors="replace"), expected.encode()
    )
