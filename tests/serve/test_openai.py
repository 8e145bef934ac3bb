"""What requests may say, and how they are refused."""

import json

import pytest

from jmoe.decode.requests import Sampling
from jmoe.serve.answers import Refused
from jmoe.serve.openai import AskedChat, AskedCompletion, read

COMPLETION = {"model": "m", "prompt": "a"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


def completion(**fields) -> AskedCompletion:
    return read(AskedCompletion, json.dumps(COMPLETION | fields).encode())


def chat(**fields) -> AskedChat:
    return read(AskedChat, json.dumps(CHAT | fields).encode())


def refusal(ask, **fields) -> Refused:
    with pytest.raises(Refused) as refused:
        ask(**fields)
    assert refused.value.status == 400
    assert "\n" not in refused.value.message
    return refused.value


def test_what_isnt_asked_for_is_as_openai_has_it():
    for asked in (completion(), chat()):
        sampling = asked.sampling(9, (0, 5))
        assert sampling == Sampling(
            max_new_tokens=9, temperature=1.0, stop_ids=(0, 5), seed=sampling.seed
        )
        assert asked.choices == 1 and asked.num_logprobs is None
        assert not asked.stream and not asked.tells_usage
    assert asked.sampling(9, ()).seed != asked.sampling(9, ()).seed


def test_what_is_asked_for_reaches_the_engine():
    asked = completion(
        temperature=0,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=2,
        seed=4,
        stop="x",
        stop_token_ids=[8],
        logprobs=2,
    )
    assert asked.sampling(7, (0,)) == Sampling(
        max_new_tokens=7,
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=2.0,
        seed=4,
        stop_ids=(0, 8),
        stop_texts=("x",),
        logprobs=2,
    )
    ignoring = completion(ignore_eos=True, top_k=-1, stop=["x", "y"])
    sampling = ignoring.sampling(7, (0,))
    assert (sampling.stop_ids, sampling.top_k) == ((), 0)
    assert sampling.stop_texts == ("x", "y")


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", ""], ["a", ""]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_are_texts_or_tokens_one_or_several(given, prompts):
    assert completion(prompt=given).prompt == prompts


@pytest.mark.parametrize(
    "prompt",
    [None, 5, [], [[]], [[1], []], [1, "a"], ["a", [1]], [True], [1.5], {}, [[["a"]]]],
    ids=str,
)
def test_anything_else_is_no_prompt(prompt):
    assert refusal(completion, prompt=prompt).field == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", 1e300),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2**40),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e300),
        ("seed", -1),
        ("seed", 2**32),
        ("n", 0),
        ("n", 1.5),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 2000),
        ("stop_token_ids", [[1]]),
        ("deadline_seconds", 0),
        ("stream", 1),
        ("model", None),
        ("user", 5),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_named_with_its_field(field, value):
    for ask in (completion, chat):
        refused = refusal(ask, **{field: value})
        assert refused.message.startswith(f"{refused.field}=")
        assert refused.field and refused.field.partition("[")[0] == field


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_is_no_temperature(text):
    body = json.dumps(COMPLETION)[:-1] + f', "temperature": {text}}}'
    with pytest.raises(Refused) as found:
        read(AskedCompletion, body.encode())
    assert found.value.field == "temperature"


@pytest.mark.parametrize(
    ("field", "harmless", "value"),
    [
        ("tools", [], [{"type": "function"}]),
        ("tool_choice", "none", "auto"),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("logit_bias", {}, {"5": 100}),
        ("presence_penalty", 0, 0.5),
        ("frequency_penalty", 0.0, -1),
        ("best_of", 1, 3),
        ("suffix", "", "end"),
        ("min_tokens", 0, 4),
        ("reasoning_effort", None, "high"),
        ("audio", None, {"voice": "x"}),
    ],
)
def test_what_isnt_served_is_refused_by_name_unless_it_asks_for_nothing(
    field, harmless, value
):
    for ask in (completion, chat):
        ask(**{field: harmless})
        ask(**{field: None})
        refused = refusal(ask, **{field: value})
        assert refused.field == field and "isn't served" in refused.message


def test_what_openais_servers_alone_make_use_of_changes_nothing():
    hints = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"}
    told = {"stream": True, "stream_options": {"include_obfuscation": False}}
    for ask in (completion, chat):
        asked = ask(seed=1, **hints, **told)
        assert asked.sampling(9, ()) == ask(seed=1).sampling(9, ())
        assert not asked.tells_usage
        told["stream_options"]["include_obfuscation"] = True
        refused = refusal(ask, **told)
        assert refused.field == "stream_options.include_obfuscation"
        told["stream_options"]["include_obfuscation"] = False


def test_a_field_that_nobody_knows_is_refused_by_name():
    assert refusal(completion, temprature=0).field == "temprature"
    assert refusal(completion, messages=[]).field == "messages"
    assert refusal(chat, prompt="a").field == "prompt"
    unknown = {"role": "user", "content": "a", "mood": "good"}
    assert refusal(chat, messages=[unknown]).field == "messages[0].mood"
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"stream": True, "stream_options": options}
    refused = refusal(completion, **asked)
    assert refused.field == "stream_options.continuous_usage_stats"


@pytest.mark.parametrize(
    ("ask", "fields", "said"),
    [
        (completion, {"stream_options": {"include_usage": True}}, "stream=true"),
        (completion, {"echo": True, "logprobs": 0}, "echo"),
        (chat, {"top_logprobs": 3}, "top_logprobs needs logprobs"),
        (chat, {"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": ["a"]}, "messages[0]"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content is needed"),
        (chat, {"messages": [{"role": "pope", "content": "a"}]}, "role='pope'"),
    ],
)
def test_what_does_not_go_together_is_refused(ask, fields, said):
    assert said in refusal(ask, **fields).message


def test_contents_of_messages_are_texts_or_lists_of_them():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answered = {"role": "assistant", "content": "c", "tool_calls": None}
    messages = [{"role": "user", "content": parts, "name": "x"}, answered]
    asked = chat(messages=[*messages, {"role": "system", "content": "d"}])
    assert [message.for_template() for message in asked.messages] == [
        {"role": "user", "content": "a\nb", "name": "x"},
        {"role": "assistant", "content": "c"},
        {"role": "system", "content": "d"},
    ]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    refused = refusal(chat, messages=[{"role": "user", "content": image}])
    assert refused.field and refused.field.startswith("messages[0].content")
    called = {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}
    assert refusal(chat, messages=[called]).field == "messages[0].tool_calls"


def test_both_names_of_the_longest_answer_are_known():
    assert completion(max_tokens=5).longest == 5
    assert chat(max_tokens=5).longest == 5
    assert chat(max_completion_tokens=6).longest == 6
    assert chat(max_tokens=6, max_completion_tokens=6).longest == 6
    assert refusal(completion, max_completion_tokens=6).field == "max_completion_tokens"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"a"', b"\xff", b'{"a": \xff}', b"[" * 10**5]
)
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(Refused) as found:
        read(AskedCompletion, body)
    assert found.value.status == 400 and "body" in found.value.message


def test_text_that_is_no_unicode_is_refused_and_told_in_unicode():
    surrogate = b'"\\ud800"'
    for field in (b"prompt", b"stop", b"user"):
        body = b'{"model": "m", "prompt": "a", "%s": %s}' % (field, surrogate)
        with pytest.raises(Refused) as found:
            read(AskedCompletion, body)
        assert (found.value.field or "").startswith(field.decode())
        assert found.value.message.encode()
    body = b'{"model": "m", "messages": [{"role": "user", "content": %s}]}' % surrogate
    with pytest.raises(Refused) as found:
        read(AskedChat, body)
    assert "content" in (found.value.field or "")
