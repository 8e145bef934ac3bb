"""A meeting of processes: all of them, or an error on each that says who is missing.

JAX's own start-up ends a process from C++ when another one doesn't come, and doesn't
say which. So processes meet here first, over plain sockets at the coordinator's address
(`jmoe.parallel.door`). Process 0 listens until each of the others has connected, proved
that it knows the run's secret (`jmoe.parallel.lines`) and said who it is; then it tells
all of them that they may go on, or why they may not.

The connections stay. `Group.exchange` passes small values over them, one line of JSON
each, which takes no device and waits for none; a process that fails tells the others,
and one that dies is noticed at once, as its host closes its connection, or within half
a minute where the host itself is gone.
"""

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jmoe.parallel.door import Door, Way, split_address
from jmoe.parallel.lines import SECRET, Line, StrangerError, introduce

_RETRY_S = 0.2
_LATE_S = 5.0  # for those still to come to hear of a mistake
_VERDICT_S = 10.0  # how much later than its own time-out process 0 may answer


class ElsewhereError(ValueError):
    """Another process failed; the message says which, and how."""


class Loss(NamedTuple):
    """Why a group can't go on."""

    reason: str
    is_missing: bool  # a process has ended without a word, rather than by an error

    def as_error(self) -> Exception:
        return (ConnectionError if self.is_missing else ElsewhereError)(self.reason)


class Group:
    """Processes that have met. Each calls the same methods in the same order.

    Not thread-safe.
    """

    def __init__(
        self,
        index: int = 0,
        lines: Sequence[Line] = (),
        names: Sequence[str] = (),
        reach: Callable[[], Line] | None = None,
        door: Door | None = None,
        size: int = 1,
    ):
        """`lines`: process 0 has one to each of the others, and each of them one.

        Args:
          names: what to call whom a line leads to.
          reach: opens a line for a connection of JAX's to process 0.
          door: process 0's.
          size: how many processes there are.
        """
        self.index, self.size = index, size
        self._lines = list(lines)
        self._reach, self._door = reach, door
        self._way: Way | None = None
        self._inboxes = [queue.SimpleQueue[dict[str, Any] | None]() for _ in lines]
        self._lock = threading.RLock()
        self._telling = threading.Lock()  # no message overtakes another
        self._leaves = False
        self._loss: Loss | None = None
        self._is_lost = threading.Event()
        self._on_loss: Callable[[Loss], None] | None = None
        for line, inbox, name in zip(self._lines, self._inboxes, names, strict=True):
            arguments = (line, inbox, name)
            threading.Thread(target=self._read, args=arguments, daemon=True).start()

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
        if self.index > 0:
            self._tell({"what": what, "value": value})
            return self._take(self._inboxes[0], what)["values"]
        messages = [self._take(inbox, what) for inbox in self._inboxes]
        values = [value, *(message["value"] for message in messages)]
        self._tell({"what": what, "values": values})
        return values

    def fail(self, reason: str) -> None:
        """Ends the others with `ElsewhereError`, where they exchange now or next."""
        with self._lock:
            self._leaves = True  # what becomes of the others is their own matter
        self._tell({"lost": Loss(f"process {self.index}: {reason}", False)})

    @property
    def has_left(self) -> bool:
        """Whether this process has failed or closed the group."""
        return self._leaves

    def await_loss(self, timeout_s: float) -> Loss | None:
        """Returns why the group can't go on, once that is known; None if it can."""
        self._is_lost.wait(timeout_s)
        return self._loss

    def watch(self, on_loss: Callable[[Loss], None]) -> None:
        """Has `on_loss` called, once, when another process fails or is missing.

        In a thread of its own, as the program's may be waiting for that process, and
        before `exchange` raises.
        """
        with self._lock:
            self._on_loss, loss = on_loss, self._loss
        if loss is not None:
            on_loss(loss)

    def open_way_for_jax(self) -> str:
        """Returns the address that JAX, on this host, is to take for its coordinator's.

        Process 0 calls it first, and an exchange keeps the others waiting until then.
        """
        if self._door is not None:
            return self._door.open_service()
        assert self._reach is not None
        self._way = Way(self._reach)
        return self._way.address

    def close(self) -> None:
        with self._lock:
            self._leaves = True
        self._tell({"leaves": True})
        for line in self._lines:
            line.close()
        for listening in (self._door, self._way):
            if listening is not None:
                listening.close()
        self._lines = []

    def _take(self, inbox: queue.SimpleQueue, what: str) -> dict[str, Any]:
        message = inbox.get()
        if message is None:
            inbox.put(None)  # for the next one who asks
            gone = Loss(f"a process has left that is waited for at {what!r}.", True)
            raise (self._loss or gone).as_error()
        assert message["what"] == what, (message, what)
        return message

    def _read(self, line: Line, inbox: queue.SimpleQueue, name: str) -> None:
        """All that comes over a line, and how it ends, whatever the program does."""
        has_left = False
        with contextlib.suppress(OSError, ValueError):
            while True:
                message = line.receive()
                if "lost" in message:
                    self._lose(Loss(*message["lost"]), line)
                    return
                has_left = "leaves" in message
                inbox.put(None if has_left else message)
        if not has_left:
            self._lose(Loss(f"{name} is missing: it has ended, or its host.", True))

    def _lose(self, loss: Loss, source: Line | None = None) -> None:
        """The first to be lost is the reason for all that follows."""
        with self._lock:
            if self._leaves or self._loss is not None:
                return
            self._loss, on_loss = loss, self._on_loss
        if self.index == 0:
            self._tell({"lost": loss}, but=source)
        if on_loss is not None:
            on_loss(loss)
        self._is_lost.set()
        for inbox in self._inboxes:
            inbox.put(None)

    def _tell(self, message: Mapping[str, Any], but: Line | None = None) -> None:
        """Sends it to all that have a line to this process."""
        with self._telling:
            for line in self._lines:
                # If it has ended, that is noticed by who reads its line.
                if line is not but:
                    with contextlib.suppress(OSError):
                        line.send(message)


def meet(
    address: str, count: int, index: int, timeout_s: float, secret: bytes
) -> Group:
    """Waits for all of `count` processes, of which this is number `index`.

    Args:
      address: host:port of process 0.
      secret: the same on all processes.

    Raises:
      TimeoutError: not all came; names those that didn't, on each that did.
      ValueError: they don't agree on `count` or the secret, or two have one index; or
        something else listens at `address`.
      OSError: process 0 can't listen at `address`.
    """
    split_address(address)
    if index == 0:
        return _receive_others(address, count, timeout_s, secret)
    return _reach_first(address, count, index, timeout_s, secret)


def ranges(indices: Iterable[int]) -> str:
    """ "0-2, 5" for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _receive_others(address: str, count: int, timeout_s: float, secret: bytes) -> Group:
    deadline = time.monotonic() + timeout_s
    joined: dict[int, tuple[Line, str]] = {}
    refused: list[Line] = []
    error: Exception | None = None
    door = Door(address, secret)
    while _absent(joined, count):
        guest = door.next_guest(deadline - time.monotonic())
        if guest is None:
            break
        hello, line = guest
        index = hello["index"]
        mistake = _mistake(joined, index, count, hello["count"])
        if mistake is None:
            if index in joined:
                joined[index][0].close()  # it had died, and comes again
            joined[index] = line, _name(hello)
            continue
        refused.append(line)
        error = error or ValueError(mistake)
        deadline = min(deadline, time.monotonic() + _LATE_S)
    absent = _absent(joined, count)
    if absent and error is None:
        error = TimeoutError(_missing(absent, count, timeout_s) + door.strangers())
    door.refuse_more(f"The {count} processes at {address} have met already.")
    verdict = {
        "error": error and str(error),
        "kind": type(error).__name__,
        "first": _name(_hello(0, count)),
    }
    lines = [joined[index][0] for index in sorted(joined)]
    names = [joined[index][1] for index in sorted(joined)]
    for line in (*refused, *lines):
        with contextlib.suppress(OSError):
            line.send(verdict)
    if error is not None:
        for line in (*refused, *lines):
            line.close()
        door.close()
        raise error
    return Group(0, lines, names, door=door, size=count)


def _hello(index: int, count: int, purpose: str = "meet") -> dict[str, Any]:
    return {
        "purpose": purpose,
        "index": index,
        "count": count,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def _name(hello: Mapping[str, Any]) -> str:
    return f"process {hello['index']} ({hello['host']}, pid {hello['pid']})"


def _absent(joined: Mapping[int, tuple[Line, str]], count: int) -> list[int]:
    """Those that have not come yet, or have gone again."""
    others = range(1, count)
    return [i for i in others if i not in joined or joined[i][0].has_ended()]


def _mistake(
    joined: Mapping[int, tuple[Line, str]], index: int, count: int, its_count: int
) -> str | None:
    if its_count != count:
        return (
            f"num_processes={count} on process 0, but {its_count} on process {index}."
        )
    if index == 0 or index in joined and not joined[index][0].has_ended():
        return f"Two processes have process_id={index}."
    return None


def _reach_first(
    address: str, count: int, index: int, timeout_s: float, secret: bytes
) -> Group:
    deadline = time.monotonic() + timeout_s
    hello = _hello(index, count)
    while True:
        try:
            line = _reach(address, secret, hello, deadline)
            return _heed(address, count, index, secret, line, timeout_s)
        except ConnectionError as error:
            reason = error
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{_missing([0], count, timeout_s)} It can't be reached at "
                f"coordinator={address!r}: {reason}."
            )
        time.sleep(_RETRY_S)


def _reach(
    address: str, secret: bytes, hello: Mapping[str, Any], deadline: float
) -> Line:
    """A line to process 0.

    Raises:
      ConnectionError: nobody is there yet.
      ValueError: somebody else is.
    """
    left_s = max(deadline - time.monotonic(), _RETRY_S)
    try:
        connection = socket.create_connection(split_address(address), timeout=left_s)
    except OSError as error:  # an unknown name, or no way to the host: it may come
        raise ConnectionError(error) from error
    if connection.getsockname() == connection.getpeername():
        connection.close()  # a port to which nobody listens may connect to itself
        raise ConnectionError("nobody listens there")
    line = Line(connection)
    try:
        introduce(line, secret, hello)
    except OSError as error:
        line.close()
        raise ConnectionError(error) from error
    except StrangerError as error:
        line.close()
        raise ValueError(
            f"coordinator={address!r}: something else than process 0 listens there, or "
            f"it has another secret ({SECRET}, or the file in its user's "
            "configuration)."
        ) from error
    return line


def _heed(
    address: str, count: int, index: int, secret: bytes, line: Line, timeout_s: float
) -> Group:
    """Goes on, or doesn't, as process 0 decides."""
    try:
        verdict = line.receive(deadline=time.monotonic() + timeout_s + _VERDICT_S)
    except TimeoutError:
        line.close()
        raise TimeoutError(
            f"Process 0, at coordinator={address!r}, doesn't answer."
        ) from None
    except ConnectionError:
        line.close()
        raise
    if verdict["error"] is not None:
        line.close()
        kind = TimeoutError if verdict["kind"] == "TimeoutError" else ValueError
        raise kind(verdict["error"])
    line.connection.settimeout(None)

    def reach() -> Line:
        hello = _hello(index, count, "jax")
        return _reach(address, secret, hello, time.monotonic() + timeout_s)

    return Group(index, [line], [verdict["first"]], reach, size=count)


def _missing(indices: Iterable[int], count: int, timeout_s: float) -> str:
    return (
        f"Of {count} processes, number {ranges(indices)} didn't come within "
        f"{timeout_s:g} s."
    )
