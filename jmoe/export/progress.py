"""How much of a conversion is done, in the terminal: bytes, their rate, time left."""

import threading
import time

import rich.console
import rich.progress

from jmoe.data.formatting import duration


class TransferProgress:
    """A bar while it is entered; where nobody watches, one line at the end.

    Args:
      title: what is written where.
    """

    def __init__(self, title: str, out: rich.console.Console | None = None):
        self._title = title
        self._out = out or rich.console.Console(highlight=False)
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._started = time.monotonic()
        is_watched = self._out.file.isatty() and not self._out.is_dumb_terminal
        self._bar = _bar(self._out) if is_watched else None

    def __enter__(self) -> "TransferProgress":
        return self

    def start(self, total: int):
        """Shows a bar of `total` bytes; returns what is told of further ones."""
        self._total = total
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.add_task(self._title, total=total)
            self._bar.start()
        return self.advance

    def advance(self, nbytes: int) -> None:
        """Counts; may be called from several threads."""
        with self._lock:  # the bar too, or an older sum could be its last
            self._done += nbytes
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done)

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._total:
            seconds = time.monotonic() - self._started
            rate = self._done / max(seconds, 1e-9) / 1e9
            self._out.print(
                f"{self._title}: {self._done / 1e9:.2f} GB in {duration(seconds)}, "
                f"{rate:.2f} GB/s",
                soft_wrap=True,
            )


def _bar(out: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=None, complete_style="cyan"),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=out,
        expand=True,
        refresh_per_second=2,  # the cores have weights to convert
    )
