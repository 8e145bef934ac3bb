"""Texts completed by a model here: as its engine does, and each prompt by itself."""

import dataclasses

import pytest

from jmoe.decode.generate import generate
from jmoe.decode.requests import Sampling
from jmoe.evals.completions import LocalModel, Prompted, cut

TEXTS = ["ab", "What is half of a half?", "the"]
NEW = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def model(cfg, variables, tokenizer):
    return LocalModel(cfg, variables, tokenizer)


def complete(model, *prompts):
    return sorted(model.complete([Prompted(*prompt) for prompt in prompts]))


@pytest.fixture(scope="module")
def replies(model):
    return complete(model, *((text, NEW) for text in TEXTS))


def test_texts_are_those_of_the_most_likely_tokens(model, replies):
    prompts = [model.tokenizer.prompt(text) for text in TEXTS]
    want = generate(
        model.cfg,
        model.variables,
        prompts,
        max_new_tokens=8,
        stop_ids=model.tokenizer.stop_ids,
    )
    assert [reply.text for reply in replies] == [*map(model.tokenizer.decode, want)]
    assert [reply.number for reply in replies] == [0, 1, 2]


def test_tokens_are_a_prompt_as_well_as_their_text_is(model, replies):
    ids = model.tokenizer.prompt(TEXTS[1])
    (got,) = complete(model, (ids, NEW))
    assert got.text == replies[1].text


def test_a_prompt_that_is_too_long_is_an_error_and_the_others_go_on(model, replies):
    long = [3] * model.cfg.max_positions
    wrong = [10**6]
    first, second, third, last = complete(
        model, (long, NEW), (TEXTS[0], NEW), (wrong, NEW), (TEXTS[2], NEW)
    )
    assert first.finish_reason == third.finish_reason == "error"
    assert "A prompt of 64 tokens" in first.error and "there are 64" in first.error
    assert "lies outside of vocab_size" in third.error
    assert (second.text, last.text) == (replies[0].text, replies[2].text)


def test_an_answer_has_as_many_tokens_as_there_are_positions_for(model):
    prompt = [3] * (model.cfg.max_positions - 5)
    (got,) = complete(model, (prompt, Sampling(max_new_tokens=8192)))
    assert got.error == "" and got.finish_reason in ("length", "stop")


def test_a_text_ends_before_a_stop(model, replies):
    stop = replies[1].text[3:5]
    sampling = dataclasses.replace(NEW, stop_texts=(stop, "never in it"))
    (got,) = complete(model, (TEXTS[1], sampling))
    assert got.text == replies[1].text[: replies[1].text.index(stop)]
    assert got.finish_reason == "stop"


def test_nothing_asked_is_nothing_answered(model):
    assert complete(model) == []


def test_the_first_of_several_stops_counts():
    assert cut("one two three", ["three", "two", "four"]) == "one "
    assert cut("one", []) == "one"
