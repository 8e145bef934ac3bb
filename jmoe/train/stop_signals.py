"""SIGTERM and Ctrl-C: the first asks a run to stop, the second ends the process.

Python calls a handler only between two steps of the main thread's own code, and that
may be in a compilation for minutes. So a thread of its own hears of a signal (by
`signal.set_wakeup_fd`), to say at once what becomes of it, and to end the process
whatever the others do.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# `timeout` sends one signal twice: to its child, and to the group that it is in.
_SAME_S = 0.02
_SHOW_CURSOR = "\x1b[?25h"  # that a live line has hidden


class StopSignals:
    """Listens while it is entered; outside the main thread it can't, and hears none.

    Args:
      say: shows a line; called from another thread.

    Attributes:
      first: the number of the signal that asked to stop, or 0.
    """

    def __init__(self, say: Callable[[str], None]):
        self.first = 0
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._heard, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._others = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._before = {n: signal.signal(n, self._ask) for n in SIGNALS}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Makes signals act as before, from now on."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._others)
        os.close(self._wakeup)
        self._thread.join()
        os.close(self._heard)

    def _ask(self, number: int, _: Any) -> None:
        self.first = self.first or number

    def _listen(self) -> None:
        asked_at = None
        while heard := os.read(self._heard, 1):
            number, now = heard[0], time.monotonic()
            if number not in SIGNALS:
                if self._others >= 0:
                    os.write(self._others, heard)
            elif asked_at is None:
                asked_at = now
                self._say(
                    f"{signal.Signals(number).name}: stopping after this step, with a "
                    "checkpoint; once more: at once, without saving."
                )
            elif now - asked_at > _SAME_S:
                _end(number)


def _end(number: int) -> None:
    """Ends the process without any cleaning up, which could take or raise."""
    name = signal.Signals(number).name
    cursor = _SHOW_CURSOR if sys.stdout.isatty() else ""
    os.write(2, f"{cursor}\n{name}: ended without saving.\n".encode())
    os._exit(128 + number)
