"""A meeting of processes: all of them, or an error on each that says who is missing.

JAX's own start-up ends a process from C++ when another one doesn't come, and doesn't
say which. So processes meet here first, over plain sockets at the coordinator's
address, and JAX listens there afterwards. Process 0 listens until each of the others
has connected and said who it is; then it tells all of them that they may go on, or why
they may not.

The connections stay. `Group.exchange` passes small values over them, one line of JSON
each, which takes no device and waits for none; so a process that fails can tell the
others, and one that dies is noticed.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_RETRY_S = 0.2
_HELLO_S = 5.0  # for a new connection to say who it is
_LATE_S = 5.0  # for those still to come to hear of a mistake
_VERDICT_S = 10.0  # how much later than its own time-out process 0 may answer
_MAX_LINE = 64 << 20
_GREETING = "jmoe process"


class ElsewhereError(ValueError):
    """Another process failed; the message says which, and how."""


class _Line:
    """One end of a connection: JSON values, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._file = connection.makefile("rb")

    def send(self, value: Any) -> None:
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        """Raises ConnectionError at its end, ValueError for what isn't JSON."""
        line = self._file.readline(_MAX_LINE)
        if not line:
            raise ConnectionError("closed")
        return json.loads(line)

    def has_ended(self) -> bool:
        """Whether the other end is gone; only before it has anything to say."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end may have closed it
            self.connection.shutdown(socket.SHUT_RDWR)  # wakes who waits for a line
        self._file.close()
        self.connection.close()


class Group:
    """Processes that have met. Each calls the same methods in the same order.

    Not thread-safe.
    """

    def __init__(self, index: int = 0, lines: Sequence[_Line] = ()):
        """`lines`: process 0 has one to each of the others, and each of them one."""
        self.index = index
        self._lines: Sequence[_Line] = lines

    @property
    def is_alone(self) -> bool:
        return not self._lines

    def exchange(self, what: str, value: Any) -> list[Any]:
        """The values of all processes, by index. Waits for all of them.

        Args:
          what: names the exchange, the same on all processes.
          value: what JSON can hold.

        Raises:
          ElsewhereError: another process called `fail` instead.
          ConnectionError: another process has ended.
        """
        if self.is_alone:
            return [value]
        mine = {"what": what, "value": value}
        if self.index > 0:
            try:
                self._lines[0].send(mine)
                outcome = self._lines[0].receive()
            except ConnectionError:
                raise ConnectionError(_gone(0, what)) from None
        else:
            outcome = self._collect(mine)
        if "failed" in outcome:
            kind = ConnectionError if outcome["ended"] else ElsewhereError
            raise kind(outcome["failed"])
        return outcome["values"]

    def fail(self, reason: str) -> None:
        """Ends with `ElsewhereError` what the others exchange now or next."""
        outcome = {"failed": f"process {self.index}: {reason}", "ended": False}
        self.tell(outcome)

    def close(self) -> None:
        for line in self._lines:
            line.close()
        self._lines = ()

    def _collect(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """What process 0 learns from all, and tells all."""
        outcome: dict[str, Any] = {"values": [mine["value"]]}
        for index, line in enumerate(self._lines, start=1):
            try:
                message = line.receive()
            except ConnectionError:
                outcome = {"failed": _gone(index, mine["what"]), "ended": True}
                break
            if "failed" in message:
                outcome = message
                break
            assert message["what"] == mine["what"], (message["what"], mine["what"])
            outcome["values"].append(message["value"])
        self.tell(outcome)
        return outcome

    def tell(self, outcome: Mapping[str, Any]) -> None:
        """Sends it to all that have a line to this process."""
        for line in self._lines:
            # If it has ended, that is noticed where its word is needed.
            with contextlib.suppress(OSError):
                line.send(outcome)


def meet(address: str, count: int, index: int, timeout_s: float) -> Group:
    """Waits for all of `count` processes, of which this is number `index`.

    Args:
      address: host:port of process 0.

    Raises:
      TimeoutError: not all came; names those that didn't, on each that did.
      ValueError: they don't agree on `count`, or two have one index; or something else
        listens at `address`.
    """
    _, port = split_address(address)
    if index == 0:
        return _receive_others(address, port, count, timeout_s)
    return _reach_first(address, count, index, timeout_s)


def split_address(address: str) -> tuple[str, int]:
    """Host and port; ValueError if it isn't host:port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"coordinator={address!r} must read host:port.")
    return host.strip("[]"), int(port)


def ranges(indices: Iterable[int]) -> str:
    """ "0-2, 5" for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _receive_others(address: str, port: int, count: int, timeout_s: float) -> Group:
    deadline = time.monotonic() + timeout_s
    joined: dict[int, _Line] = {}
    refused: list[_Line] = []
    error: Exception | None = None
    with _listen(address, port) as listener:
        while _absent(joined, count) and _is_ready(listener, deadline):
            line, index, its_count = _welcome(listener)
            if line is None:
                continue
            mistake = _mistake(joined, index, count, its_count)
            if mistake is None:
                if index in joined:
                    joined[index].close()  # it had died, and comes again
                joined[index] = line
                continue
            refused.append(line)
            error = error or ValueError(mistake)
            deadline = min(deadline, time.monotonic() + _LATE_S)
    absent = _absent(joined, count)
    if absent and error is None:
        error = TimeoutError(_missing(absent, count, timeout_s))
    everyone = Group(0, [*refused, *(joined[index] for index in sorted(joined))])
    everyone.tell({"error": error and str(error), "kind": type(error).__name__})
    if error is not None:
        everyone.close()
        raise error
    return everyone


def _listen(address: str, port: int) -> socket.socket:
    """At all of this host's addresses, as JAX's own service will."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    both = family == socket.AF_INET6
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(
            f"coordinator={address!r}: process 0 can't listen there: {error}."
        ) from error


def _absent(joined: Mapping[int, _Line], count: int) -> list[int]:
    """Those that have not come yet, or have gone again."""
    others = range(1, count)
    return [i for i in others if i not in joined or joined[i].has_ended()]


def _is_ready(listener: socket.socket, deadline: float) -> bool:
    """Whether somebody connects in time."""
    left_s = max(deadline - time.monotonic(), 0.0)
    return bool(select.select([listener], [], [], left_s)[0])


def _welcome(listener: socket.socket) -> tuple[_Line | None, int, int]:
    """Who connects: a line, its index and its count; no line if it isn't one of us."""
    connection, _ = listener.accept()
    connection.settimeout(_HELLO_S)
    line = _Line(connection)
    try:
        greeting, index, count = line.receive()
        connection.settimeout(None)
    except (OSError, ValueError, TypeError):
        greeting, index, count = "", 0, 0
    if greeting == _GREETING:
        return line, index, count
    line.close()
    return None, 0, 0


def _mistake(
    joined: Mapping[int, _Line], index: int, count: int, its_count: int
) -> str | None:
    if its_count != count:
        return (
            f"num_processes={count} on process 0, but {its_count} on process {index}."
        )
    if index == 0 or index in joined and not joined[index].has_ended():
        return f"Two processes have process_id={index}."
    return None


def _reach_first(address: str, count: int, index: int, timeout_s: float) -> Group:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            line = _connect(address, deadline)
            line.send([_GREETING, index, count])
            line.connection.settimeout(timeout_s + _VERDICT_S)
            return _heed(address, line, index)
        except ConnectionError as error:
            reason = error
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{_missing([0], count, timeout_s)} It can't be reached at "
                f"coordinator={address!r}: {reason}."
            )
        time.sleep(_RETRY_S)


def _connect(address: str, deadline: float) -> _Line:
    """Raises ConnectionError if nobody is there yet."""
    left_s = max(deadline - time.monotonic(), _RETRY_S)
    try:
        connection = socket.create_connection(split_address(address), timeout=left_s)
    except OSError as error:  # an unknown name, or no way to the host: it may come
        raise ConnectionError(error) from error
    if connection.getsockname() == connection.getpeername():
        connection.close()  # a port to which nobody listens may connect to itself
        raise ConnectionError("nobody listens there")
    return _Line(connection)


def _heed(address: str, line: _Line, index: int) -> Group:
    """Goes on, or doesn't, as process 0 decides."""
    try:
        verdict = line.receive()
        error, kind = verdict["error"], verdict["kind"]
    except ConnectionError:
        line.close()
        raise
    except TimeoutError:
        line.close()
        raise TimeoutError(
            f"Process 0, at coordinator={address!r}, doesn't answer."
        ) from None
    except (ValueError, TypeError, KeyError):
        line.close()
        raise ValueError(
            f"coordinator={address!r}: something else than process 0 listens there."
        ) from None
    if error is not None:
        line.close()
        raise TimeoutError(error) if kind == "TimeoutError" else ValueError(error)
    line.connection.settimeout(None)
    return Group(index, [line])


def _missing(indices: Iterable[int], count: int, timeout_s: float) -> str:
    return (
        f"Of {count} processes, number {ranges(indices)} didn't come within "
        f"{timeout_s:g} s."
    )


def _gone(index: int, what: str) -> str:
    return f"process {index} has ended, and is waited for at {what!r}."
