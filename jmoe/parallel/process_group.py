"""A run's processes once they have met: small values between them, and who is gone.

`ProcessGroup.exchange` passes values over the connections on which processes have met
(`jmoe.parallel.rendezvous`), one line of JSON each, which takes no device and waits for
none; a process that fails tells the others, and one that dies is noticed at once, as
its host closes its connection, or within half a minute where the host itself is gone.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jmoe.parallel.channel import Channel
from jmoe.parallel.listener import Forwarder, Listener


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

    def send(self, what: str, value: Any) -> None:
        """Sends a value from process 0 to each of the others, and waits for none.

        Raises:
          RemoteError, ConnectionError: as `exchange`.
        """
        if self._failure is not None:
            raise self._failure.as_error()
        self._tell({"what": what, "value": value})

    def receive(self, what: str) -> Any:
        """Returns the next value that process 0 has sent, or will.

        Raises:
          RemoteError, ConnectionError: as `exchange`.
        """
        return self._take(self._inboxes[0], what)["value"]

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
