"""Completes a file of prompts: a JSON object a line, in the order of the prompts."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self, TextIO

import rich.console

from jmoe.data.formatting import count, duration
from jmoe.data.progress import live_line
from jmoe.data.tokenizer import Tokenizer
from jmoe.decode.prompts import Prompt
from jmoe.decode.requests import Completion, Sampling
from jmoe.decode.terminal import Completer
from jmoe.decode.text import whole


def encode(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], name: str
) -> list[list[int]]:
    """Returns each prompt's ids.

    Args:
      name: of the prompts' file, for messages.

    Raises:
      ValueError: a part of a prompt has no token.
    """
    found = []
    for prompt in prompts:
        try:
            found.append(tokenizer.prompt(prompt.text))
        except ValueError as error:
            raise ValueError(
                f"prompts={name!r}, line {prompt.line}: {error}"
            ) from error
    return found


def complete_prompts(
    completer: Completer,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    out: TextIO,
) -> list[Completion]:
    """Writes each prompt's record with what became of it, when its turn comes.

    What has ended is written also when an error, or Ctrl-C, ends the others. Returns
    what has been completed, in the order in which it ended.

    Args:
      ids: of each prompt, what the tokenizer makes of it.
    """
    ended: list[Completion] = []
    waiting: dict[int, Completion] = {}
    following = 0

    def write_one(number: int) -> None:
        out.write(_line(completer, prompts, ids, waiting.pop(number)) + "\n")
        out.flush()

    try:
        with _Progress(len(prompts) * completer.num_samples) as progress:
            for completion in completer.engine.complete(_requests(completer, ids)):
                ended.append(completion)
                waiting[completion.number] = completion
                progress.add(len(completion.tokens))
                while following in waiting:
                    write_one(following)
                    following += 1
    finally:
        for number in sorted(waiting):
            write_one(number)
    return ended


def _requests(
    completer: Completer, ids: Sequence[list[int]]
) -> Iterator[tuple[list[int], Sampling]]:
    for prompt in ids:
        for sampling in completer.samplings():
            yield prompt, sampling


def _line(
    completer: Completer,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    completion: Completion,
) -> str:
    """Returns the prompt's record, and its completion, as a line of JSON."""
    place, sample = divmod(completion.number, completer.num_samples)
    found: dict[str, Any] = dict(prompts[place].record)
    stream = completer.text_stream(ids[place])
    found["completion"] = whole(stream, completion.tokens)
    found["finish_reason"] = completion.finish_reason
    found["num_tokens"] = len(completion.tokens)
    if completer.num_samples > 1:
        found["sample"] = sample
    if completion.error:
        found["error"] = completion.error
    return json.dumps(found, ensure_ascii=False)


class _Progress:
    """A bar on standard error while it is entered, where somebody watches that.

    Args:
      total: how many completions there will be.
    """

    def __init__(self, total: int):
        out = rich.console.Console(stderr=True, highlight=False)
        self._total, self._done, self._tokens = total, 0, 0
        self._started = time.monotonic()
        self._live = None
        # In a terminal that the results go to, they show how far it is.
        is_apart = sys.stdout is None or not sys.stdout.isatty()
        if out.is_terminal and not out.is_dumb_terminal and is_apart:
            self._live = live_line(out)
            self._live.add_task("", total=total, text=self._text())

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def add(self, tokens: int) -> None:
        """Counts a completion."""
        self._done += 1
        self._tokens += tokens
        if self._live is not None:
            task = self._live.task_ids[0]
            self._live.update(task, completed=self._done, text=self._text())

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        left = "-:--:--"
        if self._done:
            left = duration(seconds / self._done * (self._total - self._done))
        return (
            f"{self._done:,} of {self._total:,}  {count(self._tokens / seconds)} tok/s"
            f"  {left} [dim]left[/dim]"
        )
