"""The rendezvous of a run's processes: all meet, or each is told who is missing.

JAX's own start-up ends a process from C++ when another one doesn't come, and doesn't
say which. So processes meet here first, over plain sockets at the coordinator's address
(`jmoe.parallel.listener`). Process 0 listens until each of the others has connected,
proved that it knows the run's secret (`jmoe.parallel.channel`) and said who it is; then
it tells all of them that they may go on, or why they may not.

The connections stay. `ProcessGroup.exchange` passes small values over them, one line of
JSON each, which takes no device and waits for none; a process that fails tells the
others, and one that dies is noticed at once, as its host closes its connection, or
within half a minute where the host itself is gone.
"""

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jmoe.parallel.channel import SECRET, AuthenticationError, Channel, answer_challenge
from jmoe.parallel.listener import Forwarder, Listener, split_address

_RETRY_S = 0.2
_LATE_S = 5.0  # for those still to come to hear of a mistake
_VERDICT_S = 10.0  # how much later than its own time-out process 0 may answer


class RemoteError(ValueError):
    """Another process failed; the message says which, and how."""


class Failure(NamedTuple):
    """Says why a group can't go on."""

    reason: str
    is_missing: bool  # a process has ended without a word, rather than by an error

    def as_error(self) -> Exception:
        return (ConnectionError if self.is_missing else RemoteError)(self.reason)


class ProcessGroup:
    """Processes that have met. Each calls the same methods in the same order.

    Not thread-safe.
    """

    def __init__(
        self,
        index: int = 0,
        channels: Sequence[Channel] = (),
        names: Sequence[str] = (),
        reach: Callable[[], Channel] | None = None,
        listener: Listener | None = None,
        size: int = 1,
    ):
        """`channels`: process 0 has one to each of the others, and each of them one.

        Args:
          names: what to call whom a channel leads to.
          reach: opens a channel for a connection of JAX's to process 0.
          listener: process 0's.
          size: how many processes there are.
        """
        self.index, self.size = index, size
        self._channels = list(channels)
        self._reach, self._listener = reach, listener
        self._forwarder: Forwarder | None = None
        self._inboxes = [queue.SimpleQueue[dict[str, Any] | None]() for _ in channels]
        self._lock = threading.RLock()
        self._telling = threading.Lock()  # no message overtakes another
        self._leaves = False
        self._failure: Failure | None = None
        self._has_failed = threading.Event()
        self._on_failure: Callable[[Failure], None] | None = None
        for arguments in zip(self._channels, self._inboxes, names, strict=True):
            threading.Thread(target=self._read, args=arguments, daemon=True).start()

    @property
    def is_alone(self) -> bool:
        return not self._channels

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Returns the values of all processes, by index.

        Waits for all of them.

        Args:
          what: names the exchange, the same on all processes.
          value: what JSON can hold.

        Raises:
          RemoteError: another process called `fail` instead.
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
        """Ends the others with `RemoteError`, where they exchange now or next."""
        with self._lock:
            self._leaves = True  # what becomes of the others is their own matter
        self._tell({"failure": Failure(f"process {self.index}: {reason}", False)})

    @property
    def has_left(self) -> bool:
        """Whether this process has failed or closed the group."""
        return self._leaves

    def await_failure(self, timeout_s: float) -> Failure | None:
        """Returns why the group can't go on, once that is known; None if it can."""
        self._has_failed.wait(timeout_s)
        return self._failure

    def watch(self, on_failure: Callable[[Failure], None]) -> None:
        """Has `on_failure` called, once, when another process fails or is missing.

        In a thread of its own, as the program's may be waiting for that process, and
        before `exchange` raises.
        """
        with self._lock:
            self._on_failure, failure = on_failure, self._failure
        if failure is not None:
            on_failure(failure)

    def forward_jax(self) -> str:
        """Returns the address that JAX, on this host, is to take for its coordinator's.

        Process 0 calls it first, and an exchange keeps the others waiting until then.
        """
        if self._listener is not None:
            return self._listener.open_service()
        assert self._reach is not None
        self._forwarder = Forwarder(self._reach)
        return self._forwarder.address

    def close(self) -> None:
        with self._lock:
            self._leaves = True
        self._tell({"leaves": True})
        for channel in self._channels:
            channel.close()
        for listening in (self._listener, self._forwarder):
            if listening is not None:
                listening.close()
        self._channels = []

    def _take(self, inbox: queue.SimpleQueue, what: str) -> dict[str, Any]:
        message = inbox.get()
        if message is None:
            inbox.put(None)  # for the next one who asks
            gone = Failure(f"a process has left that is waited for at {what!r}.", True)
            raise (self._failure or gone).as_error()
        assert message["what"] == what, (message, what)
        return message

    def _read(self, channel: Channel, inbox: queue.SimpleQueue, name: str) -> None:
        """Reads all that comes over a channel, whatever the program does."""
        has_left = False
        with contextlib.suppress(OSError, ValueError):
            while True:
                message = channel.receive()
                if "failure" in message:
                    self._report_failure(Failure(*message["failure"]), channel)
                    return
                has_left = "leaves" in message
                inbox.put(None if has_left else message)
        if not has_left:
            reason = f"{name} is missing: it has ended, or its host."
            self._report_failure(Failure(reason, True))

    def _report_failure(self, failure: Failure, source: Channel | None = None) -> None:
        """Takes the first failure as the reason for all that follows."""
        with self._lock:
            if self._leaves or self._failure is not None:
                return
            self._failure, on_failure = failure, self._on_failure
        if self.index == 0:
            self._tell({"failure": failure}, but=source)
        if on_failure is not None:
            on_failure(failure)
        self._has_failed.set()
        for inbox in self._inboxes:
            inbox.put(None)

    def _tell(self, message: Mapping[str, Any], but: Channel | None = None) -> None:
        """Sends it to all that have a channel to this process."""
        with self._telling:
            for channel in self._channels:
                # If it has ended, that is noticed by who reads its channel.
                if channel is not but:
                    with contextlib.suppress(OSError):
                        channel.send(message)


def join(
    address: str, count: int, index: int, timeout_s: float, secret: bytes
) -> ProcessGroup:
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
    """Returns "0-2, 5" for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _receive_others(
    address: str, count: int, timeout_s: float, secret: bytes
) -> ProcessGroup:
    deadline = time.monotonic() + timeout_s
    joined: dict[int, tuple[Channel, str]] = {}
    refused: list[Channel] = []
    error: Exception | None = None
    listener = Listener(address, secret)
    while _absent(joined, count):
        arrived = listener.next_process(deadline - time.monotonic())
        if arrived is None:
            break
        hello, channel = arrived
        index = hello["index"]
        mistake = _mistake(joined, index, count, hello["count"])
        if mistake is None:
            if index in joined:
                joined[index][0].close()  # it had died, and comes again
            joined[index] = channel, _name(hello)
            continue
        refused.append(channel)
        error = error or ValueError(mistake)
        deadline = min(deadline, time.monotonic() + _LATE_S)
    absent = _absent(joined, count)
    if absent and error is None:
        error = TimeoutError(_missing(absent, count, timeout_s) + listener.strangers())
    listener.refuse_more(f"The {count} processes at {address} have met already.")
    verdict = {
        "error": error and str(error),
        "kind": type(error).__name__,
        "first": _name(_hello(0, count)),
    }
    channels = [joined[index][0] for index in sorted(joined)]
    names = [joined[index][1] for index in sorted(joined)]
    for channel in (*refused, *channels):
        with contextlib.suppress(OSError):
            channel.send(verdict)
    if error is not None:
        for channel in (*refused, *channels):
            channel.close()
        listener.close()
        raise error
    return ProcessGroup(0, channels, names, listener=listener, size=count)


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


def _absent(joined: Mapping[int, tuple[Channel, str]], count: int) -> list[int]:
    """Returns those that have not come yet, or have gone again."""
    others = range(1, count)
    return [i for i in others if i not in joined or joined[i][0].has_ended()]


def _mistake(
    joined: Mapping[int, tuple[Channel, str]], index: int, count: int, its_count: int
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
) -> ProcessGroup:
    deadline = time.monotonic() + timeout_s
    hello = _hello(index, count)
    while True:
        try:
            channel = _reach(address, secret, hello, deadline)
            return _heed(address, count, index, secret, channel, timeout_s)
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
) -> Channel:
    """Returns a channel to process 0.

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
    channel = Channel(connection)
    try:
        answer_challenge(channel, secret, hello)
    except OSError as error:
        channel.close()
        raise ConnectionError(error) from error
    except AuthenticationError as error:
        channel.close()
        raise ValueError(
            f"coordinator={address!r}: something else than process 0 listens there, or "
            f"it has another secret ({SECRET}, or the file in its user's "
            "configuration)."
        ) from error
    return channel


def _heed(
    address: str, count: int, index: int, secret: bytes, channel: Channel, timeout_s
) -> ProcessGroup:
    """Goes on, or doesn't, as process 0 decides."""
    try:
        verdict = channel.receive(deadline=time.monotonic() + timeout_s + _VERDICT_S)
    except TimeoutError:
        channel.close()
        raise TimeoutError(
            f"Process 0, at coordinator={address!r}, doesn't answer."
        ) from None
    except ConnectionError:
        channel.close()
        raise
    if verdict["error"] is not None:
        channel.close()
        kind = TimeoutError if verdict["kind"] == "TimeoutError" else ValueError
        raise kind(verdict["error"])
    channel.connection.settimeout(None)

    def reach() -> Channel:
        hello = _hello(index, count, "jax")
        return _reach(address, secret, hello, time.monotonic() + timeout_s)

    return ProcessGroup(index, [channel], [verdict["first"]], reach, size=count)


def _missing(indices: Iterable[int], count: int, timeout_s: float) -> str:
    return (
        f"Of {count} processes, number {ranges(indices)} didn't come within "
        f"{timeout_s:g} s."
    )
