"""Processes that wait for their turn, so that systems can be measured side by side.

Each side of a comparison lives in a process of its own: its memory is its own, and its
environment is set before its libraries load. The parent lets one compute at a time, and
all of them in every round, because a machine's speed drifts by more than what is
measured here.

The parent imports neither JAX nor torch. A side is therefore given by name, and is a
function that builds and warms up what it measures and returns tasks: callables that
return once their work is done.
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

Tasks = Mapping[str, Callable[[], Any]]

# Virtual devices return their memory after each step, and to map it anew in small pages
# takes a seventh of a pipeline's step. Where Linux gives huge ones to those who ask,
# glibc does if told so before the process starts.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# Threads of one library spin for a while after their work; the next waits for that.
_PAUSE_SECONDS = 0.3
_WARM_UP_CALLS = 2


class Turn(NamedTuple):
    """What one turn took: seconds of each call, and the last call's result.

    peak_bytes: the process's largest resident memory so far. resident_bytes: now.
    """

    seconds: list[float]
    result: Any
    peak_bytes: int
    resident_bytes: int


class Worker:
    """A process that holds the tasks of one side; a context manager.

    Args:
      side: dotted name of the function that makes the tasks.
      setup: called in the process before `side`'s module is imported.
      environment: variables set for the process.
      limit: seconds that `side` may take; None: any.
      options: arguments of `side`.

    Raises:
      RuntimeError: the process ended, or took longer.
    """

    def __init__(
        self,
        side: str,
        *,
        setup: Callable[[], Any] | None = None,
        environment: Mapping[str, str] | None = None,
        limit: float | None = None,
        **options: Any,
    ):
        context = multiprocessing.get_context("spawn")
        self._side = side
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, side, setup, options), daemon=True
        )
        with _environment(environment or {}):
            self._process.start()
        theirs.close()
        self._receive(limit)  # it is ready

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()

    def run(self, task: str, calls: int = 1, *, limit: float | None = None) -> Turn:
        """Calls the task `calls` times in a row.

        Raises:
          RuntimeError: the process ended, or took over `limit` seconds; then it is
            killed.
        """
        with contextlib.suppress(BrokenPipeError):  # how it ended is told below
            self._pipe.send((task, calls))
        return self._receive(limit)

    def _receive(self, limit: float | None) -> Any:
        try:
            if self._pipe.poll(limit):
                return self._pipe.recv()
            self._process.kill()
            raise RuntimeError(f"{self._side} gave no answer within {limit:.0f} s.")
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(
                f"{self._side} ended with exit code {self._process.exitcode}; "
                "its own message is above."
            ) from None


class Seat(NamedTuple):
    """One side's part in every round: which task, and how often in a row."""

    worker: Worker
    task: str
    calls: int = 1


def take_turns(seats: Mapping[str, Seat], rounds: int) -> dict[str, list[Turn]]:
    """All seats' turns; every other round goes backwards, against a steady drift."""
    turns: dict[str, list[Turn]] = {name: [] for name in seats}
    names = list(seats)
    for index in range(rounds):
        for name in names if index % 2 == 0 else names[::-1]:
            time.sleep(_PAUSE_SECONDS)
            worker, task, calls = seats[name]
            turns[name].append(worker.run(task, calls))
    return turns


def per_round(turns: Sequence[Turn]) -> list[float]:
    """Returns seconds of one call, for each round."""
    return [statistics.median(turn.seconds) for turn in turns]


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Returns the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def warm_up(task: Callable[[], Any]) -> None:
    """Compiles, and lets memory grow to what it will be; for a side to call."""
    for _ in range(_WARM_UP_CALLS):
        task()


def cores() -> int:
    """How many this process, and so each side, may use."""
    return len(os.sched_getaffinity(0))


def virtual_devices(count: int) -> dict[str, str]:
    """Returns the environment of a process to which the CPU is so many devices.

    The user's other flags stay: of two that are alike, XLA takes the last.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    count_flag = f"--xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": f"{flags} {count_flag}".strip()}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    pipe: Connection,
    side: str,
    setup: Callable[[], Any] | None,
    options: Mapping[str, Any],
) -> None:
    """The child's life: make the tasks, then call them until the parent hangs up."""
    if setup is not None:
        setup()
    module, _, name = side.rpartition(".")
    tasks: Tasks = getattr(importlib.import_module(module), name)(**options)
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            task, calls = pipe.recv()
            pipe.send(_take_turn(tasks[task], calls))


def _take_turn(task: Callable[[], Any], calls: int) -> Turn:
    seconds, result = [], None
    for _ in range(calls):
        start = time.perf_counter()
        result = task()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Turn(seconds, result, peak, _resident_bytes())


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
