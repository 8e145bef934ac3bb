"""Processes that tokenise the pieces of a source, as many as there are cores for.

The tokenizers library has threads, but Python reads a document, hashes it, and makes an
array of its tokens: 0.16 s on 10 MB of text, beside 2.8 s of one core's tokenising. So
threads would keep 18 cores busy at most, and a node has over 100. A process does it all
for its own pieces; cores that no piece is left for serve the others as threads.

Run as a program this is such a process: it reads tasks as lines of JSON and answers so.
It ends with whoever it works for. (multiprocessing's would run the user's own script
again, and import JAX with it.)
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import tokenizers

from jmoe.data.parts import Add, Parts, Report
from jmoe.data.readers import Piece
from jmoe.data.tokenizer import Tokenizer

_ROOT = pathlib.Path(__file__).parents[2]

Task = tuple[int, Piece]  # a piece and its number


def make_parts(parts: Parts, tasks: Sequence[Task], add: Add) -> Iterator[Report]:
    """Tokenises pieces, at once; yields their reports in the order of `tasks`.

    Raises:
      ValueError, OSError: as `Parts.make` does, of the first piece in that order.
      ChildProcessError: a process ended.
    """
    cores = _count_cores()
    count = min(cores, len(tasks))
    if count <= 1:
        for number, piece in tasks:
            yield parts.make(number, piece, add)
        return
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def one(task: Task) -> Report:
        worker = idle.get()
        try:
            return worker.make(*task, add)
        finally:
            idle.put(worker)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        with contextlib.ExitStack() as stack:  # ends before the pool, which waits
            for _ in range(count):
                worker = _Worker(_setup(parts), cores // count)
                stack.callback(worker.end)
                idle.put(worker)
            yield from pool.map(one, tasks)


class _Worker:
    """One process; a thread at a time may ask it for something."""

    def __init__(self, setup: dict[str, Any], threads: int):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | _environment(threads),
            encoding="utf-8",
            process_group=0,  # Ctrl-C is for the process that it works for
        )
        self._tell(setup)

    def make(self, number: int, piece: Piece, add: Add) -> Report:
        self._tell([number, piece])
        while answer := self._hear():
            match answer:
                case ["added", documents, tokens]:
                    add(documents, tokens)
                case ["made", report]:
                    return Report(**report)
                case ["mistake", text]:
                    raise ValueError(text)
                case ["failed", *arguments]:
                    raise OSError(*arguments)
        code = self._process.wait()
        raise ChildProcessError(
            f"{piece.path}: the process that tokenised it ended with code {code}; if "
            "it was killed, there may have been too little memory. The same command "
            "goes on from what is finished."
        )

    def end(self) -> None:
        """Ends at once; what it was making is left unfinished."""
        self._process.kill()
        self._process.communicate()

    def _tell(self, message: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is found to have ended
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None


def _count_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environment(threads: int) -> dict[str, str]:
    """Returns the environment of a process that finds jmoe where this one has."""
    roots = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }


def _setup(parts: Parts) -> dict[str, Any]:
    tokenizer = parts.tokenizer
    return {
        "directory": str(parts.directory),
        "tokenizer": tokenizer.backend_json(),
        "eos_id": tokenizer.eos_id,
        "opening": tokenizer.opening,
        "text_field": parts.text_field,
        "on_corrupt": parts.on_corrupt,
    }


def _work() -> NoReturn:
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    setup = tasks.get()
    backend = tokenizers.Tokenizer.from_str(setup["tokenizer"])
    parts = Parts(
        pathlib.Path(setup["directory"]),
        Tokenizer(backend, setup["eos_id"], opening=setup["opening"]),
        setup["text_field"],
        setup["on_corrupt"],
    )
    while True:
        number, piece = tasks.get()
        try:
            report = parts.make(number, Piece(*piece), lambda *x: _answer("added", *x))
            _answer("made", report._asdict())
        except ValueError as error:
            _answer("mistake", str(error))
        except OSError as error:
            _answer("failed", error.errno, error.strerror, error.filename)


def _listen(tasks: "queue.SimpleQueue[Any]") -> None:
    """Works until there is nobody to work for."""
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(0)


def _answer(*message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    _work()
