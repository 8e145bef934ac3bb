"""Completions in a terminal: as they come, for one prompt or for line after line.

Ctrl-C ends an answer, and not the engine. It may come at any moment of a step, and what
a step was given is gone before it returns what follows it; so a handler notes it, and
the answer is cancelled between two steps.
"""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from jmoe.config import checks
from jmoe.data.tokenizer import Tokenizer
from jmoe.decode.acceptance import acceptance
from jmoe.decode.engine import Engine
from jmoe.decode.requests import Completion, Sampling
from jmoe.decode.text import TextStream

RULE = "-" * 40  # between the samples of one prompt


@dataclasses.dataclass
class Completer:
    """Completes texts by an engine, `num_samples` times each.

    sampling: of the first sample; each next one has the next seed, also the first one
    of the next text. tokenizer: the engine must have its `decode`.
    """

    engine: Engine
    tokenizer: Tokenizer
    sampling: Sampling
    num_samples: int = 1

    def samplings(self) -> Iterator[Sampling]:
        """Yields those of the samples of one text, and moves on to the next text's."""
        for _ in range(self.num_samples):
            yield self.sampling
            self.sampling = self.sampling.further(1)

    def text_stream(self, prompt: list[int]) -> TextStream:
        """Returns what makes text of the tokens that follow the prompt's."""
        context = prompt[len(self.tokenizer.opening) :]
        return TextStream(self.tokenizer.decode, context, self.sampling.stop_texts)

    def show(
        self, prompt: str, out: TextIO, is_cancelled: Callable[[], bool]
    ) -> list[Completion]:
        """Writes the samples one after the other, the first as its tokens come.

        Raises:
          ValueError: the prompt can't be completed; nothing was written.
        """
        ids = self.tokenizer.prompt(prompt)
        numbers = [self.engine.submit(ids, x) for x in self.samplings()]
        place = {number: i for i, number in enumerate(numbers)}
        streams = {number: self.text_stream(ids) for number in numbers}
        shown = _InOrder(out, prompt, self.num_samples)
        ended = []
        while len(ended) < len(numbers):
            if is_cancelled():
                for number in numbers:
                    self.engine.cancel(number)
            for completion, new in self.engine.step():
                stream, i = streams[completion.number], place[completion.number]
                tokens = completion.tokens
                shown.add(i, stream.add(tokens[len(tokens) - new :]))
                if completion.finish_reason:
                    shown.add(i, stream.end())
                    shown.end(i)
                    ended.append(completion)
        return ended


class _InOrder:
    """Writes texts that grow side by side one after the other.

    opening: what each begins with.
    """

    def __init__(self, out: TextIO, opening: str, count: int):
        self._out, self._opening = out, opening
        self._waiting: list[str] = [""] * count
        self._has_ended = [False] * count
        self._current = -1
        self._next()

    def add(self, number: int, text: str) -> None:
        if number != self._current:
            self._waiting[number] += text
        elif text:
            self._out.write(text)
            self._out.flush()

    def end(self, number: int) -> None:
        self._has_ended[number] = True
        while self._current < len(self._waiting) and self._has_ended[self._current]:
            self._out.write("\n")
            self._next()
        self._out.flush()

    def _next(self) -> None:
        self._current += 1
        if self._current < len(self._waiting):
            rule = f"{RULE}\n" if self._current else ""
            self._out.write(rule + self._opening + self._waiting[self._current])
            self._out.flush()


def show_one(completer: Completer, prompt: str) -> None:
    """Shows a prompt's completions; Ctrl-C ends the process as it does elsewhere."""
    summarize(completer.show(prompt, sys.stdout, lambda: False))


def interact(completer: Completer) -> bool:
    """Completes each line of standard input until it ends, as by Ctrl-D.

    Returns whether all lines could be completed. What can't be is told on standard
    error.

    Raises:
      ValueError: the input isn't UTF-8.
    """
    is_watched = sys.stdin.isatty()
    if is_watched:
        import readline  # noqa: F401  (lines can then be edited, and called back)

        print("Ctrl-C ends an answer, Ctrl-D the program.", file=sys.stderr)
    works = True
    while (line := _read_line("> " if is_watched else "")) is not None:
        if not line.strip():
            continue
        try:
            if not checks.is_unicode(line):
                raise ValueError("A prompt must be UTF-8.")
            with noted_interrupts() as interrupts:
                found = completer.show(line, sys.stdout, lambda: bool(interrupts))
            summarize(found)
        except ValueError as error:
            works = False
            print(f"error: {error}", file=sys.stderr)
    return works


def _read_line(mark: str) -> str | None:
    """Returns what is typed or piped, without its end; None at the end of all."""
    while True:
        try:
            return input(mark)
        except EOFError:
            if mark:
                print()
            return None
        except KeyboardInterrupt:
            if not mark:
                raise
            print()  # what was typed is dropped
        except UnicodeDecodeError as error:
            raise ValueError("Standard input must be UTF-8.") from error


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Yields a list to which Ctrl-C adds; the second raises KeyboardInterrupt."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            signal.default_int_handler(number, frame)
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def summarize(completions: list[Completion], *, always: bool = False) -> None:
    """Tells on standard error how fast it was, to who watches, and how drafts did."""
    has_drafts = any(completion.accepted for completion in completions)
    if always or has_drafts or sys.stderr.isatty():
        print(summary(completions), file=sys.stderr)


def summary(completions: list[Completion]) -> str:
    """Returns a line about completions that were begun together."""
    tokens = sum(len(completion.tokens) for completion in completions)
    took = max((x.times[-1] for x in completions if x.times), default=0.0)
    rate = tokens / took if took else 0.0
    line = f"{tokens:,} tokens in {took:.2f} s, {rate:,.1f} tok/s"
    drafted = acceptance(completions)
    if not drafted.accepted:
        return line
    rates = ", ".join(f"{rate:.0%}" for rate in drafted.rates)
    return f"{line}; drafts right: {rates}; {drafted.tokens_a_step:.2f} tokens a step"
