"""Files of prompts: what is written of each, in which order, and what an end leaves."""

import io
import json

import pytest
import tokenizers
from tokenizers import models

from jmoe.data.tokenizer import Tokenizer, train_bpe
from jmoe.decode.bulk import complete_prompts, encode
from jmoe.decode.prompts import Prompt
from jmoe.decode.requests import Completion, Sampling
from jmoe.decode.terminal import Completer

TOKENIZER = Tokenizer(train_bpe([], vocab_size=257), eos_id=0)  # a token a byte
PROMPTS = [
    Prompt(i + 1, text, {"prompt": text, "id": i}) for i, text in enumerate("ab")
]


class Ending:
    """Ends requests in the order that it is told, with their numbers as their text."""

    def __init__(self, *order: int | BaseException):
        self.order = order
        self.seeds: list[int] = []

    def complete(self, requests):
        self.seeds = [sampling.seed for _, sampling in requests]
        for number in self.order:
            if isinstance(number, BaseException):
                raise number
            tokens = TOKENIZER.encode(f"{number}!")
            yield Completion(number, tokens=tokens, finish_reason="stop")


def run(engine, out) -> list[Completion]:
    ids = encode(TOKENIZER, PROMPTS, "a file")
    completer = Completer(engine, TOKENIZER, Sampling(seed=5, stop_texts=("!",)), 2)
    return complete_prompts(completer, PROMPTS, ids, out)


def test_lines_are_in_the_order_of_prompts_and_samples_whatever_ends_first():
    engine, out = Ending(2, 0, 3, 1), io.StringIO()
    assert [completion.number for completion in run(engine, out)] == [2, 0, 3, 1]
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert [row["completion"] for row in rows] == ["0", "1", "2", "3"]
    assert engine.seeds == [5, 6, 7, 8]


def test_a_line_is_written_as_soon_as_those_before_it_are():
    class Watched(io.StringIO):
        def flush(self):
            written.append(self.getvalue().count("\n"))

    written: list[int] = []
    run(Ending(1, 0, 2, 3), Watched())
    assert written == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("full")])
def test_what_has_ended_is_written_also_when_the_others_are_given_up(error):
    out = io.StringIO()
    with pytest.raises(type(error)):
        run(Ending(0, 3, error), out)
    found = [json.loads(line)["completion"] for line in out.getvalue().splitlines()]
    assert found == ["0", "3"]


def test_a_prompt_without_tokens_is_named_with_its_line():
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(
        ValueError, match="prompts='a file', line 2: .*no token for 'b'"
    ):
        encode(Tokenizer(backend, eos_id=0), PROMPTS, "a file")
