"""Many starts of one program, for those that are killed: its imports are done once.

    with starts.Program("jmoe.commands.train") as train:
        start = train.start(["--workdir=runs/a"], tmp_path / "out")
        time.sleep(1)
        start.kill()

Each start is a process of its own: a copy (`fork`) of one that has imported the
program's module and done nothing else, so that it is at work within milliseconds. It
has its own command line, and its output is in a file.
"""

import importlib
import json
import os
import pathlib
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).parents[2]
_POLL_S = 0.002
_ANSWER_BYTES = 16  # each, since two may be there when the first is read


class Start:
    """One process. pid: its number."""

    def __init__(self, pid: int, answers: int):
        self.pid = pid
        self._answers = answers
        self._code: int | None = None

    def code(self) -> int | None:
        """Exit code, or less the number of the signal that ended it; None: it runs."""
        if self._code is None:
            os.set_blocking(self._answers, False)
            try:
                self._code = int(os.read(self._answers, _ANSWER_BYTES))
            except BlockingIOError:
                return None
        return self._code

    def wait(self, timeout_s: float) -> int:
        """The exit code; where it takes longer, kills it and raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while (code := self.code()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"Not done within {timeout_s:g} s; killed.")
            time.sleep(_POLL_S)
        return code

    def kill(self) -> None:
        """Kills it as an out-of-memory killer does: nothing of it runs any more."""
        if self.code() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)


class Program:
    """Starts what `module.start()` runs, one process at a time; a context manager.

    Args:
      imports: more modules that it will need, imported once too. None of these may
        make JAX find its devices, which a copied process can't use.
      environment: variables for all starts.
    """

    def __init__(
        self,
        module: str,
        *,
        imports: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, module, *imports],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout.fileno()
        self._last: Start | None = None

    def start(self, arguments: Sequence[str], out: pathlib.Path, *first: Any) -> Start:
        """Returns once the process is there.

        Args:
          out: a file that gets all that it prints.
          first: "module:function" and arguments, which it calls before the program.
        """
        order = [list(arguments), str(out.absolute()), *first]
        os.set_blocking(self._answers, True)
        self._orders.write(json.dumps(order).encode() + b"\n")
        self._orders.flush()
        self._last = Start(int(os.read(self._answers, _ANSWER_BYTES)), self._answers)
        return self._last

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # ends when there are no more orders
            self._orders.close()
            if self._last is not None:
                self._last.kill()


def _serve(module: str, imports: Sequence[str]) -> None:
    """Copies itself for every order on stdin; answers with the number, then the end."""
    for name in (module, *imports):
        importlib.import_module(name)
    for order in sys.stdin:
        pid = os.fork()
        if not pid:
            _become(module, *json.loads(order))
        _answer(pid)
        _, status = os.waitpid(pid, 0)
        _answer(os.waitstatus_to_exitcode(status))


def _answer(number: int) -> None:
    os.write(1, f"{number:{_ANSWER_BYTES}}".encode())


def _become(
    module: str,
    arguments: Sequence[str],
    out: str,
    first: str | None = None,
    *given: Any,
) -> NoReturn:
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(fd, target)
    sys.argv = [f"{module}.py", *arguments]
    if first is not None:
        pkgutil.resolve_name(first)(*given)
    sys.modules[module].start()
    raise AssertionError("The program ends its process.")


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
