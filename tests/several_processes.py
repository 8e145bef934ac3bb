"""Several processes: real ones, which are ended in time, and threads in their place.

Threads will do where nothing but sockets joins the processes.
"""

import contextlib
import itertools
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jmoe.parallel import channel, processes, rendezvous
from tests.faults import starts

ROOT = pathlib.Path(__file__).parents[1]
SECRET = b"only these processes know it"


class Ended(NamedTuple):
    code: int
    out: str  # less what Gloo prints of its connections
    err: str


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(
    arguments: Sequence[str | os.PathLike],
    *,
    devices: int = 2,
    root: pathlib.Path = ROOT,
    cwd: pathlib.Path | None = None,
) -> subprocess.Popen:
    """Python with these arguments, so many virtual devices, and jmoe from `root`."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | environment(devices) | {"PYTHONPATH": str(root)},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def environment(devices: int) -> dict[str, str]:
    """Variables of a process of some virtual devices and with our secret.

    It finds nothing compiled: see `runtime.keep_compiled`.
    """
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        channel.SECRET: SECRET.decode(),
    }


def xla_flags(devices: int) -> str:
    """The tests' own, for so many devices: of two flags alike, the last one counts."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


class Copy(NamedTuple):
    """A process of a program that was imported before; out and err: what it says."""

    start: starts.Start
    out: pathlib.Path
    err: pathlib.Path

    def ended(self, timeout_s: float = 150) -> Ended:
        code = self.start.wait(timeout_s)
        return Ended(code, without_gloo(self.out.read_text()), self.err.read_text())


@contextlib.contextmanager
def program_of_two(module: str, *imports: str) -> Iterator[Callable[..., list[Copy]]]:
    """Gives a function that starts two processes of two devices each, at once.

    Either is a copy of one that has imported the program and what else it needs, which
    takes most of a short process's time. The function takes the arguments of both, and
    in which directories they work.
    """
    with tempfile.TemporaryDirectory() as said, contextlib.ExitStack() as stack:
        programs = [
            stack.enter_context(
                starts.Program(
                    module, imports=[*imports, __name__], environment=environment(2)
                )
            )
            for _ in range(2)
        ]
        names, copies = map(str, itertools.count()), []

        def start(arguments, cwd=(ROOT, ROOT)) -> list[Copy]:
            while copies:
                copies.pop().start.kill()  # if a test has failed and left it
            for program, own, at in zip(programs, arguments, cwd, strict=True):
                name = pathlib.Path(said, next(names))
                out, err = name.with_suffix(".out"), name.with_suffix(".err")
                out.touch()
                err.touch()
                begin = f"{__name__}:begin", str(err), str(at)
                copies.append(Copy(program.start(own, out, *begin), out, err))
            return copies.copy()

        yield start


def begin(err: str, cwd: str) -> None:
    """Gives a copied process a directory, and a file for its errors alone."""
    os.dup2(os.open(err, os.O_WRONLY), sys.stderr.fileno())
    os.chdir(cwd)


def ended(running: Sequence[subprocess.Popen], timeout_s: float = 180) -> list[Ended]:
    """Waits for all; a hang is an error that shows what they said."""
    deadline = time.monotonic() + timeout_s
    results, late = [], False
    for process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
        out, err = process.communicate()
        results.append(Ended(process.wait(), without_gloo(out), err))
    assert not late, f"not done within {timeout_s} s: {results}"
    return results


_OF_GLOO = re.compile(
    r"(\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : )*\n"
)


def without_gloo(out: str) -> str:
    """Its threads print at once: a message may begin in the midst of another one.

    Of either, what comes after may be a line of its own, if only a line's end.
    """
    ours, line_ends = [], 0
    for line in out.splitlines(keepends=True):
        says_something = any(map(str.isalpha, line))
        if _OF_GLOO.fullmatch(line) and (says_something or line_ends > 0):
            line_ends += line.count("[Gloo]") - 1
        else:
            ours.append(line)
    return "".join(ours)


def in_parallel(
    function: Callable[..., Any], *arguments: tuple, timeout_s: float = 60
) -> list[Any]:
    """What `function` returns or raises for each of the arguments, all at once."""
    results: list[Any] = [None] * len(arguments)

    def call(place: int) -> None:
        try:
            results[place] = function(*arguments[place])
        except BaseException as error:
            results[place] = error

    # Daemons, so that one which hangs doesn't keep the tests from ending.
    threads = [
        threading.Thread(target=call, args=(place,), daemon=True)
        for place in range(len(arguments))
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
        assert not thread.is_alive(), f"not done within {timeout_s} s: {results}"
    return results


def together(function: Callable[[Any], Any], *values: Any) -> list[Any]:
    """Does as `in_parallel`; each thread is a process of a group, with its value."""
    address = free_address()

    def live(index: int) -> Any:
        group = rendezvous.join(address, len(values), index, 20.0, SECRET)
        with processes.membership(group):
            return function(values[index])

    return in_parallel(live, *((index,) for index in range(len(values))))
