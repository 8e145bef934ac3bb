"""A process that dies at a line of its own, as by kill -9.

    deaths.die_at(manifest.__file__, line=79)

No handler, no `finally` and no flush comes between: what the line would have done isn't
done, and what was done before it is there. `count_lines` tells which lines a program
comes to, and so where it can be made to die.
"""

import atexit
import collections
import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any


def die_at(file: str, line: int, times: int = 1) -> None:
    """From now on, this process dies when it comes to that line for the n-th time.

    In this thread and all that start later, before what the line says is done.

    Args:
      file: its whole path.
    """
    left, lock = times, threading.Lock()

    def come_to(frame: FrameType) -> None:
        nonlocal left
        if frame.f_lineno == line:
            with lock:
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

    _watch([file], come_to)


def count_lines(files: Collection[str], out: str) -> None:
    """From now on, counts how often this process comes to each line of these files.

    When it ends, `out` gets a JSON list of [file, line, times].
    """
    found: collections.Counter[tuple[str, int]] = collections.Counter()
    lock = threading.Lock()

    def come_to(frame: FrameType) -> None:
        with lock:
            found[frame.f_code.co_filename, frame.f_lineno] += 1

    def write() -> None:
        sys.settrace(None)
        rows = [[*place, times] for place, times in sorted(found.items())]
        pathlib.Path(out).write_text(json.dumps(rows))

    atexit.register(write)
    _watch(files, come_to)


def _watch(files: Collection[str], come_to: Callable[[FrameType], None]) -> None:
    watched = frozenset(files)

    def in_file(frame: FrameType, event: str, _: Any):
        if event == "line":
            come_to(frame)
        return in_file

    def anywhere(frame: FrameType, event: str, _: Any):
        return in_file if frame.f_code.co_filename in watched else None

    threading.settrace(anywhere)
    sys.settrace(anywhere)
