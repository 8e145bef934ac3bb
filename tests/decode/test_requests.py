"""How a request's tokens are drawn: what the record refuses."""

import dataclasses

import pytest

from jmoe.decode.requests import Completion, Sampling, check_prompt

REFUSED = [
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1."),
    ({"temperature": -0.5}, "temperature=-0.5 must be at least 0, and finite."),
    ({"temperature": float("inf")}, "temperature=inf must be at least 0, and finite."),
    ({"temperature": float("nan")}, "temperature=nan must be at least 0, and finite."),
    ({"top_k": -1}, "top_k=-1 must be at least 0."),
    ({"top_k": 2**31}, "top_k=2147483648 must be at most 2147483647."),
    ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1."),
    ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1."),
    ({"top_p": float("nan")}, "top_p=nan must be above 0 and at most 1."),
    ({"min_p": -0.1}, "min_p=-0.1 must be at least 0 and at most 1."),
    ({"min_p": 1.1}, "min_p=1.1 must be at least 0 and at most 1."),
    (
        {"repetition_penalty": 0.0},
        "repetition_penalty=0.0 must be above 0, and finite.",
    ),
    (
        {"repetition_penalty": float("inf")},
        "repetition_penalty=inf must be above 0, and finite.",
    ),
    ({"seed": -1}, "seed=-1 must be at least 0."),
    ({"seed": 2**32}, "seed=4294967296 must be at most 4294967295."),
    ({"logprobs": -1}, "logprobs=-1 must be at least 0."),
    ({"stop_ids": 5}, "stop_ids=5 must be a tuple."),
    ({"stop_texts": "end"}, "stop_texts='end' must be a tuple."),
    ({"stop_texts": ("x", "")}, "stop_texts must not hold an empty text."),
]


@pytest.mark.parametrize(
    ("fields", "complaint"), REFUSED, ids=[next(iter(x)) for x, _ in REFUSED]
)
def test_an_impossible_parameter_is_named_with_what_is_allowed(fields, complaint):
    with pytest.raises(ValueError) as refused:
        Sampling(**fields)
    assert str(refused.value) == complaint


def test_the_extremes_of_what_is_allowed_pass():
    Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, logprobs=0)
    Sampling(temperature=1e-6, top_k=2**31 - 1, top_p=1e-9, min_p=1.0, seed=2**32 - 1)


def test_every_field_that_can_be_wrong_is_tried():
    tried = {name for fields, _ in REFUSED for name in fields}
    assert tried == {field.name for field in dataclasses.fields(Sampling)}


def test_a_new_completion_shares_nothing_with_another():
    first, second = Completion(0), Completion(1)
    first.tokens.append(3)
    assert second.tokens == [] and second.finish_reason is None


@pytest.mark.parametrize(
    ("prompt", "new", "complaint"),
    [
        ([], 1, "A prompt must not be empty."),
        ([5, 300, 301], 1, "Token 300 of a prompt lies outside of vocab_size=300."),
        ([5, -2], 1, "Token -2 of a prompt lies outside of vocab_size=300."),
        (
            [5] * 30,
            11,
            "A prompt of 30 tokens and max_new_tokens=11 make 41 positions; there are "
            "40.",
        ),
    ],
)
def test_a_prompt_without_a_place_is_refused(cfg, prompt, new, complaint):
    with pytest.raises(ValueError) as refused:
        check_prompt(cfg, prompt, new, 40)
    assert str(refused.value) == complaint


def test_a_prompt_may_fill_the_last_position(cfg):
    check_prompt(cfg, [299, 0] * 15, 10, 40)
