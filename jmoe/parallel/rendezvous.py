"""The rendezvous of a run's processes: all meet, or each is told who is missing.

JAX's own start-up ends a process from C++ when another one doesn't come, and doesn't
say which. So processes meet here first, over plain sockets at the coordinator's address
(`jmoe.parallel.listener`). Process 0 listens until each of the others has connected,
proved that it knows the run's secret (`jmoe.parallel.channel`) and said who it is; then
it tells all of them that they may go on, or why they may not.

The connections stay: the processes are a group (`jmoe.parallel.process_group`).
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from jmoe.parallel.channel import SECRET, AuthenticationError, Channel, answer_challenge
from jmoe.parallel.listener import Listener, split_address
from jmoe.parallel.process_group import ProcessGroup

_RETRY_S = 0.2
_LATE_S = 5.0  # for those still to come to hear of a mistake
_VERDICT_S = 10.0  # how much later than its own time-out process 0 may answer


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
