"""Completions as a person sees them, from an engine that is told what to answer."""

import io
import itertools
import signal
import sys
from typing import Any

import pytest

from jmoe.data.tokenizer import Tokenizer, train_bpe
from jmoe.decode import terminal
from jmoe.decode.engine import Update
from jmoe.decode.requests import Completion, Sampling
from jmoe.decode.terminal import RULE, Completer

TOKENIZER = Tokenizer(train_bpe([], vocab_size=257), eos_id=0)  # a token a byte


class Told:
    """Answers requests with given texts, a token of each in a step."""

    def __init__(self, *answers: str):
        self.left = [iter(TOKENIZER.encode(answer)) for answer in answers]
        self.asked: list[Sampling] = []
        self.live: list[Completion] = []

    def submit(self, prompt, sampling):
        if len(prompt) > 20:
            raise ValueError("Too long.")
        self.asked.append(sampling)
        self.live.append(Completion(len(self.asked) - 1, steps=1, accepted=[1]))
        return self.live[-1].number

    def cancel(self, number):
        for completion in self.live:
            if completion.number == number:
                completion.finish_reason = "cancelled"

    def step(self):
        updates = []
        for completion in self.live:
            new = []
            if not completion.finish_reason:
                new = list(itertools.islice(self.left[completion.number], 1))
                completion.tokens += new
                completion.times += [0.5] * len(new)
                completion.finish_reason = None if new else "stop"
            updates.append(Update(completion, len(new)))
        self.live = [x for x in self.live if not x.finish_reason]
        return updates


class Pieces(io.StringIO):
    """Keeps what is written, piece by piece, and calls `after` each."""

    def __init__(self, after=lambda pieces: None):
        super().__init__()
        self.pieces: list[str] = []
        self._after = after

    def write(self, text):
        self.pieces.append(text)
        self._after(self.pieces)
        return super().write(text)


def completer(engine: Any, num_samples: int = 1, **sampling: Any) -> Completer:
    return Completer(engine, TOKENIZER, Sampling(**sampling), num_samples)


def never() -> bool:
    return False


def test_text_is_written_as_it_comes_and_a_character_when_it_is_whole():
    out = Pieces()
    completer(Told("a€b")).show("A: ", out, never)
    assert out.pieces == ["A: ", "a", "€", "b", "\n"]


def test_samples_grow_side_by_side_and_are_shown_one_after_the_other():
    out = Pieces()
    engine = Told("long one", "short", "")
    found = completer(engine, 3).show(">", out, never)
    shown = [">long one\n", ">short\n", ">\n"]
    assert out.getvalue() == f"{RULE}\n".join(shown)
    assert out.pieces[:3] == [">", "l", "o"]
    assert [completion.number for completion in found] == [2, 1, 0]


def test_each_sample_has_the_seed_after_that_of_the_one_before():
    engine = Told(*"abcd")
    asking = completer(engine, 2, seed=2**32 - 3)
    for prompt in ("one", "two"):
        asking.show(prompt, io.StringIO(), never)
    seeds = [sampling.seed for sampling in engine.asked]
    assert seeds == [2**32 - 3, 2**32 - 2, 2**32 - 1, 0]


def test_no_part_of_a_stop_text_is_shown():
    out = Pieces()
    stopping = completer(Told("a\nb\n\n", "c\n"), stop_texts=("\n\n",))
    stopping.show("", out, never)
    assert out.getvalue() == "a\nb\n"
    stopping.show("", out, never)  # what only may be the beginning of one is text
    assert out.getvalue() == "a\nb\nc\n\n"


@pytest.fixture
def interact(monkeypatch):
    def run(engine, typed: str, out=None) -> tuple[bool, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(sys, "stdout", out or Pieces())
        all_worked = terminal.interact(completer(engine))
        return all_worked, sys.stdout.getvalue()  # type: ignore[attr-defined]

    return run


def test_each_piped_line_is_completed_but_blank_ones(interact):
    assert interact(Told("1", "2"), "a\n\n \nb") == (True, "a1\nb2\n")


def test_a_prompt_that_cannot_be_is_told_and_the_next_is_completed(interact, capsys):
    got = interact(Told("1", "2"), f"a\n{'b' * 30}\n\udcff\nc\n")
    assert got == (False, "a1\nc2\n")
    told = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert told == ["error: Too long.", "error: A prompt must be UTF-8."]


def test_ctrl_c_ends_the_answer_and_not_the_program(interact):
    before = signal.getsignal(signal.SIGINT)

    def press(pieces):
        if pieces[-1] == "2":
            signal.raise_signal(signal.SIGINT)

    got = interact(Told("1234567", "89"), "a\nb\n", Pieces(press))
    assert got == (True, "a12\nb89\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_program(interact):
    def press(pieces):
        if pieces[-1] == "2":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interact(Told("1234567"), "a\n", Pieces(press))


def test_the_summary_has_the_speed_and_how_drafts_did():
    completions = [
        Completion(0, tokens=[1, 2, 3], times=[0.5, 1, 2], steps=2, accepted=[1, 0]),
        Completion(1, tokens=[1], times=[0.5], steps=2, accepted=[2, 1]),
    ]
    assert terminal.summary(completions) == (
        "4 tokens in 2.00 s, 2.0 tok/s; drafts right: 75%, 25%; 2.00 tokens a step"
    )
    assert terminal.summary([Completion(0)]) == "0 tokens in 0.00 s, 0.0 tok/s"
