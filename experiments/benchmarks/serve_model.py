"""What the suite `serve` serves and asks: a `bench_s` model, and real prompts."""

import itertools
import pathlib
import random
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments.benchmarks.report import ROOT
from experiments.benchmarks.workers import Tasks
from jmoe.config import DataConfig, ModelConfig
from jmoe.config.data import SourceConfig
from jmoe.data import builtin
from jmoe.data.tokenizer import load_tokenizer
from jmoe.decode.prompts import read_prompts

DIRECTORY = ROOT / "runs" / "serve" / "bench_s"
MAX_LENGTH = 1024  # of prompt and answer, in tokens
SHORTEST, LONGEST = 64, 768  # characters of a prompt made of code
# A token that isn't the likeliest by so many nats only is no other answer: the next
# tokens follow from it, and sums in another order may turn one into the other.
NEAR_TIE = 1e-2
_CODE = DataConfig(sources=(SourceConfig(path="builtin:code"),))


class Ask(NamedTuple):
    """A prompt, and how many tokens are to follow it."""

    prompt: str
    new: int


class Batch(NamedTuple):
    """Requests, of which so many are underway at a time."""

    asks: Sequence[Ask]
    at_once: int


class Reference(NamedTuple):
    """The likeliest tokens after a prompt, and by how much they are, in nats."""

    tokens: list[int]
    margins: list[float]


def export(directory: pathlib.Path) -> Tasks:
    """`export` writes random weights, always the same, beside a tokenizer of code."""
    import jax

    from jmoe.export import hf
    from jmoe.nn.model import Transformer, make_variables

    def task() -> None:
        cfg = ModelConfig.preset("bench_s")
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        tokenizer = directory.with_name("tokenizer.json")
        load_tokenizer(_CODE, cfg.vocab_size).save(tokenizer)
        make = jax.jit(make_variables, static_argnums=(0, 1))
        hf.save(directory, cfg, make(Transformer(cfg), 0), tokenizer=tokenizer)

    return {"export": task}


def prompts(path: str | None) -> Iterator[str]:
    """Yields the prompts of a file, over and over; or, without one, pieces of code.

    Pieces are of the running Python's own library, begin where a line does, and have no
    text in common, so that a server that remembers prompts' beginnings gains nothing.
    """
    if path is not None:
        yield from itertools.cycle(x.text for x in read_prompts(pathlib.Path(path)))
    for document in builtin.documents(("code",)):
        yield from pieces(document)


def pieces(document: str) -> Iterator[str]:
    """Yields parts of a document, of lengths drawn evenly on a logarithmic scale."""
    draw = random.Random(len(document))
    piece, least = "", 0.0
    for line in document.splitlines(keepends=True):
        if not piece:
            least = LONGEST * (SHORTEST / LONGEST) ** draw.random()
        piece += line
        if len(piece) >= least:
            yield piece[:LONGEST]
            piece = ""


def differs(tokens: Sequence[int], expected: Reference) -> bool:
    """Returns whether an answer is another one, and not by a near tie."""
    pairs = zip(tokens, expected.tokens, expected.margins, strict=False)
    for given, right, margin in pairs:
        if given != right:
            return margin > NEAR_TIE
    return len(tokens) != len(expected.tokens)
