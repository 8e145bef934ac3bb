"""What a completion may ask for."""

import json

import pytest

from jmoe.config.serve import LimitsConfig
from jmoe.serve.answers import Refused
from jmoe.serve.bodies import MAX_DEPTH, check

LIMITS = LimitsConfig(prompts=3, choices=4, new_tokens=100, logprobs=5, items=6)


def refused(body: bytes | dict) -> Refused:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refused) as error:
        check(encoded, LIMITS)
    assert error.value.status == 400 and "\n" not in error.value.message
    return error.value


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("n", 4),
        ("best_of", 4),
        ("max_tokens", 100),
        ("max_completion_tokens", 100),
        ("min_tokens", 100),
        ("logprobs", 5),
        ("top_logprobs", 5),
        ("prompt_logprobs", 5),
    ],
)
def test_a_number_up_to_its_limit_passes_and_one_more_is_named(field, most):
    check(json.dumps({field: most}).encode(), LIMITS)
    for value in (most + 1, 10**30, -1):
        error = refused({field: value})
        bound = f"must be at {'least' if value < 0 else 'most'} "
        shown = value if value < 10**9 else "1000000"
        assert error.message.startswith(f"{field}={shown}") and bound in error.message
        assert error.field == field


def test_a_number_that_an_engine_would_take_from_text_is_refused():
    for value in ("16384", 16384.0, [1], {}):
        assert "must be a whole number." in refused({"n": value}).message
    check(b'{"logprobs": true, "n": null}', LIMITS)  # chat's is a yes or no


def test_no_answer_is_asked_for_by_zero():
    assert refused({"n": 0}).message == "n=0 must be at least 1."


@pytest.mark.parametrize(
    ("prompt", "fits"),
    [
        ("text", True),
        ([5] * 100, True),  # one prompt, of tokens
        (["text"] * 3, True),
        ([[5] * 100] * 3, True),
        (["text"] * 4, False),
        ([[5]] * 4, False),
        ([5, "text", 6, 7], False),
    ],
)
def test_prompts_are_counted_whatever_they_are_made_of(prompt, fits):
    body = {"prompt": prompt}
    if fits:
        check(json.dumps(body).encode(), LIMITS)
    else:
        assert refused(body).message == (
            "'prompt' has 4 prompts; at most 3 may be asked for at once "
            "(limits.prompts)."
        )


def test_other_lists_are_bounded_and_a_chats_messages_by_the_bodys_size_only():
    for value in (["x"] * 7, {str(i): 1 for i in range(7)}):
        assert "has 7 items" in refused({"stop": value}).message
    assert "'body' has 7 items" in refused({str(i): 1 for i in range(7)}).message
    check(json.dumps({"messages": [{}] * 7, "stop": ["x"] * 6}).encode(), LIMITS)


def test_a_body_of_many_keys_takes_no_time_to_speak_of():
    keys = ",".join(f'"{i}": 1' for i in range(200_000))
    body = f'{{{keys}, "199999": 2}}'.encode()
    assert "'199999' is there twice" in refused(body).message


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "JSON decode error"),
        (b'{"n": ', "JSON decode error"),
        (b"[1]", "must be a JSON object"),
        (b'"n"', "must be a JSON object"),
        (b'{"n": 1, "n": 16384}', "'n' is there twice"),
        (b'{"temperature": NaN}', "NaN is no number of JSON's"),
        (b'{"temperature": -Infinity}', "-Infinity is no number of JSON's"),
        (b'{"temperature": 1e999}', "'1e999' is too large a number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "JSON decode error"),
        (b'{"prompt": "\xff"}', "must be UTF-8; it isn't at byte offset 12"),
        ('{"n": 16384}'.encode("utf-16"), "must be UTF-8"),
        (b"[" * 100_000, f"more than {MAX_DEPTH} levels deep"),
        (b'{"a":' * 99 + b"1" + b"}" * 99, f"more than {MAX_DEPTH} levels deep"),
    ],
)
def test_what_parsers_may_read_differently_or_not_at_all_is_refused(body, reason):
    assert reason in refused(body).message


def test_brackets_within_text_are_no_depth():
    check(json.dumps({"prompt": '[{\\"' * 1000}).encode(), LIMITS)
