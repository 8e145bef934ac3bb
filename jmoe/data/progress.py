"""How much of a text is tokenised, in the terminal: documents, tokens, time left."""

import threading
import time
from collections.abc import Callable
from typing import Self

import rich.console
import rich.progress
from rich.markup import escape

from jmoe.data.formatting import count, duration

_PLAIN_S = 30.0  # between two lines where nobody watches


class Progress:
    """A live line while it is entered, and a line at the end.

    Where nobody watches (a pipe, a file, CI) it is a line every half minute. After an
    error, or where there was nothing to do, there is no last line. Methods may be
    called from several threads.

    Args:
      name: of the source.
      total: bytes of the source.
      found: bytes of these that an earlier attempt has tokenised.
      out: where to write, by default standard output.
      clock: seconds since some fixed moment.
    """

    def __init__(
        self,
        name: str,
        total: int,
        found: int = 0,
        *,
        out: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name = name
        self._total = total
        self._found = self._done = found
        self._out = out or rich.console.Console(highlight=False)
        self._clock = clock
        self._started = self._shown = clock()
        self._documents = self._tokens = 0
        self._lock = threading.Lock()
        self._live = None
        if self._out.file.isatty() and not self._out.is_dumb_terminal:
            self._live = live_line(self._out)
            self._live.add_task("", total=total, completed=found, text=self._line())

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def add(self, documents: int, tokens: int) -> None:
        """Counts documents that are tokenised."""
        with self._lock:
            self._documents += documents
            self._tokens += tokens
            self._show()

    def finish(self, size: int) -> None:
        """Counts `size` bytes of the source whose documents all are."""
        with self._lock:
            self._done += size
            self._show()

    def __exit__(self, kind: object, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if kind is None and self._documents:
            took = duration(self._clock() - self._started)
            line = f"Tokenised {escape(self._name)}: {self._counts()} in {took}"
            self._out.print(line, soft_wrap=True)

    def _show(self) -> None:
        if self._live is not None:
            task = self._live.task_ids[0]
            self._live.update(task, completed=self._done, text=self._line())
        elif self._clock() - self._shown >= _PLAIN_S:
            self._shown = self._clock()
            self._out.print(self._line(), soft_wrap=True)

    def _line(self) -> str:
        name = escape(self._name)
        return f"{name}  {self._counts()}  {self._time_left()} [dim]left[/dim]"

    def _counts(self) -> str:
        seconds = max(self._clock() - self._started, 1e-9)
        return (
            f"{count(self._documents)} documents, {count(self._tokens)} tokens, "
            f"{count(self._tokens / seconds)} tok/s"
        )

    def _time_left(self) -> str:
        """Returns the time left, from the pace of this attempt."""
        done = self._done - self._found
        if not done:
            return "-:--:--"
        pace = (self._clock() - self._started) / done
        return duration(pace * (self._total - self._done))


def live_line(out: rich.console.Console) -> rich.progress.Progress:
    """Returns a bar with a line of text beside it, `fields["text"]` of its task."""
    text = rich.progress.TextColumn("{task.fields[text]}")
    text.get_table_column().no_wrap = True
    return rich.progress.Progress(
        rich.progress.BarColumn(bar_width=None, complete_style="cyan"),
        text,
        console=out,
        expand=True,
        refresh_per_second=2,  # the cores have other work
    )
