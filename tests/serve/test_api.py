"""Our engine as clients of OpenAI's API see it, over HTTP."""

import asyncio
import concurrent.futures
import json
import socket
import urllib.error
import urllib.parse

import pytest

from jmoe.decode.generate import generate
from jmoe.decode.requests import Sampling
from jmoe.serve.api import make_app
from tests.decode.test_step import LIMITS, prompt
from tests.serve.counting import Counting
from tests.serve.own import (
    NAME,
    PATIENCE,
    QUEUE,
    make_engine,
    make_served,
    serving,
    tokenizer,
)
from tests.serve.own import variables as weights
from tests.serve.running import wait_until
from tests.smallest_run import get_config

TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
TEXT = "Say: "


@pytest.fixture(scope="module")
def client():
    with serving(make_served(make_engine())) as client:
        yield client


def text_of(ids: list[int]) -> str:
    return tokenizer().decode(ids)


def expected(ids, new: int, **named) -> list[int]:
    """What the engine finds when it is called directly."""
    sampling = Sampling(max_new_tokens=new, **named)
    (done,) = make_engine().complete([(ids, sampling)])
    return done.tokens


def test_greedy_answers_are_those_of_generate_for_every_form_of_prompt(client):
    texts = [TEXT, "b"]
    ids = [tokenizer().prompt(text) for text in texts]
    model = get_config().model
    want = generate(model, weights(), ids, max_new_tokens=9)
    asked = {"max_tokens": 9, "return_token_ids": True, "ignore_eos": True}
    for given in (texts, ids):
        choices = client.complete(given, **asked)["choices"]
        assert [choice["token_ids"] for choice in choices] == want
        assert [choice["index"] for choice in choices] == [0, 1]
    for given, one in ((texts[0], want[0]), (ids[1], want[1])):
        answer = client.complete(given, **asked)
        (choice,) = answer["choices"]
        assert choice["token_ids"] == one and choice["text"] == text_of(one)
        assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["usage"] == {
        "prompt_tokens": len(ids[1]),
        "completion_tokens": 9,
        "total_tokens": len(ids[1]) + 9,
    }
    assert (answer["object"], answer["model"]) == ("text_completion", NAME)


def test_many_at_once_are_each_answered_as_if_alone(client):
    prompts = [prompt(length) for length in range(3, 3 + QUEUE)]

    def ask(ids):
        return client.complete(ids, max_tokens=7, return_token_ids=True)

    alone = [ask(ids)["choices"] for ids in prompts]
    with concurrent.futures.ThreadPoolExecutor(QUEUE) as pool:
        at_once = [answer["choices"] for answer in pool.map(ask, prompts)]
    assert at_once == alone


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_of_completions_is_the_whole_answer_in_pieces(client, logprobs):
    asked = {"prompt": [TEXT, "b"], "n": 2, "max_tokens": 9, "logprobs": logprobs}
    asked |= {"seed": 5, "temperature": 1.5, "return_token_ids": True}
    whole = client.complete(**asked)
    *sent, last = client.stream(TEXTS, **asked, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in sent) and len(sent) > 8
    for index, choice in enumerate(whole["choices"]):
        pieces = [x for chunk in sent for x in chunk["choices"] if x["index"] == index]
        assert "".join(x["text"] for x in pieces) == choice["text"]
        assert [t for x in pieces for t in x["token_ids"]] == choice["token_ids"]
        assert [x["finish_reason"] for x in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == choice["finish_reason"] == "length"
        if logprobs is None:
            continue
        for key, values in choice["logprobs"].items():
            assert [v for x in pieces for v in x["logprobs"][key]] == values


def test_a_chat_is_a_completion_of_its_template_whole_or_streamed(client):
    asked = {"max_tokens": 9, "return_token_ids": True, "logprobs": True}
    asked |= {"top_logprobs": 3, "ignore_eos": True}
    whole = client.chat("hi", **asked)
    (choice,) = whole["choices"]
    ids = [*tokenizer().encode("user:hi\n"), 0]
    assert whole["prompt_token_ids"] == ids
    assert choice["token_ids"] == expected(ids, 9)
    text = text_of(choice["token_ids"])
    assert choice["message"] == {"role": "assistant", "content": text}
    messages = [{"role": "user", "content": "hi"}]
    first, *sent, last = client.stream(CHATS, messages=messages, **asked)
    assert {chunk["object"] for chunk in sent} == {"chat.completion.chunk"}
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == choice["finish_reason"] == "length"
    pieces = [chunk["choices"][0] for chunk in sent]
    assert "".join(x["delta"]["content"] for x in pieces) == text
    told = [token for x in pieces for token in x["logprobs"]["content"]]
    assert told == choice["logprobs"]["content"] and len(told) == 9
    assert all("usage" not in chunk for chunk in sent)


def test_log_probabilities_are_the_engines_in_both_shapes(client):
    ids = tokenizer().prompt(TEXT)
    (done,) = make_engine().complete([(ids, Sampling(max_new_tokens=6, logprobs=3))])

    def ask(logprobs):
        asked = {"max_tokens": 6, "ignore_eos": True, "logprobs": logprobs}
        return client.complete(TEXT, **asked)["choices"][0]["logprobs"]

    found = ask(3)
    assert found["token_logprobs"] == pytest.approx(done.logprobs, abs=1e-4)
    top = [list(likely.values()) for likely in done.top_logprobs]
    for told, want in zip(found["top_logprobs"], top, strict=True):
        assert list(told.values()) == pytest.approx(want, abs=1e-4)
    alone = ask(0)
    assert alone["token_logprobs"] == pytest.approx(done.logprobs, abs=1e-4)
    own = zip(alone["tokens"], alone["token_logprobs"], strict=True)
    assert alone["top_logprobs"] == [{token: p} for token, p in own]


def test_a_seed_gives_the_same_texts_again_and_each_choice_another(client):
    drawn = {"max_tokens": 8, "temperature": 2, "n": 3, "return_token_ids": True}
    drawn |= {"ignore_eos": True}

    def ask(**seed):
        choices = client.complete(TEXT, **drawn, **seed)["choices"]
        return [choice["token_ids"] for choice in choices]

    first = ask(seed=7)
    ids = tokenizer().prompt(TEXT)
    assert first[1] == expected(ids, 8, temperature=2, seed=8)
    assert ask(seed=7) == first and len(set(map(tuple, first))) == 3
    assert ask(seed=8)[0] == first[1]
    assert ask() != ask()


def test_a_stop_text_ends_the_text_before_it_whole_or_streamed(client):
    asked = {"prompt": TEXT, "max_tokens": 20, "ignore_eos": True}
    whole = client.complete(**asked)["choices"][0]["text"]
    stop = whole[5:7]
    assert len(stop) == 2
    before = whole[: whole.index(stop)]
    asked |= {"stop": [stop, "~none~"]}
    (choice,) = client.complete(**asked)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (before, "stop")
    sent = client.stream(TEXTS, **asked)
    assert "".join(x["choices"][0]["text"] for x in sent) == before


def test_the_models_own_stop_token_ends_an_answer_unless_it_is_to_be_ignored(client):
    ids = prompt(9)
    want = expected(ids, 12)
    asked = {"max_tokens": 12, "return_token_ids": True}
    (choice,) = client.complete(ids, **asked, stop_token_ids=[want[4]])["choices"]
    assert choice["token_ids"] == want[: want.index(want[4])]
    assert choice["finish_reason"] == "stop"
    (choice,) = client.complete(ids, **asked, ignore_eos=True)["choices"]
    assert choice["token_ids"] == want


def test_an_echo_is_the_prompt_and_its_completion(client):
    whole = client.complete(TEXT, max_tokens=5)["choices"][0]["text"]
    asked = {"prompt": TEXT, "max_tokens": 5, "echo": True}
    assert client.complete(**asked)["choices"][0]["text"] == TEXT + whole
    sent = client.stream(TEXTS, **asked)
    assert "".join(x["choices"][0]["text"] for x in sent) == TEXT + whole


def test_how_long_an_answer_is_by_default(client):
    asked = {"return_token_ids": True, "ignore_eos": True}
    (text,) = client.complete(TEXT, **asked)["choices"]
    assert len(text["token_ids"]) == 16
    usage = client.chat("hi", **asked)["usage"]
    assert usage["total_tokens"] == LIMITS.max_length
    (longest,) = client.complete(prompt(60), **asked)["choices"]
    assert len(longest["token_ids"]) == 4


def test_models_health_metrics_and_page_are_there(client):
    (model,) = client.ask("/v1/models").json["data"]
    assert (model["id"], model["max_model_len"]) == (NAME, LIMITS.max_length)
    assert client.ask("/health").status == 200
    before = client.served.meter.totals()
    client.complete(TEXT, max_tokens=5, ignore_eos=True)
    client.ask(TEXTS, {})
    after = client.served.meter.totals()
    assert after.ended["length"] == before.ended["length"] + 1
    assert after.refused[400] == before.refused[400] + 1
    assert f'jmoe_model{{model="{NAME}"}} 1.0' in client.ask("/metrics").text
    assert "<html" in client.ask("/monitor/").text
    assert json.loads(client.ask("/nowhere").text)["error"]["code"] == 404


BAD = {
    "no JSON": (TEXTS, b"{", 400, None),
    "no prompt": (TEXTS, {"model": NAME}, 400, "prompt"),
    "an empty prompt": (TEXTS, {"model": NAME, "prompt": []}, 400, "prompt"),
    "too long a prompt": (TEXTS, {"model": NAME, "prompt": "a" * 64}, 400, "prompt"),
    "too long an answer": (
        TEXTS,
        {"model": NAME, "prompt": "a", "max_tokens": 64},
        400,
        "max_tokens",
    ),
    "no such token": (TEXTS, {"model": NAME, "prompt": [300]}, 400, None),
    "a token below 0": (TEXTS, {"model": NAME, "prompt": [-1]}, 400, None),
    "an impossible draw": (
        TEXTS,
        {"model": NAME, "prompt": "a", "top_p": 0},
        400,
        "top_p",
    ),
    "too many likely tokens": (
        TEXTS,
        {"model": NAME, "prompt": "a", "logprobs": 4},
        400,
        None,
    ),
    "too many choices": (TEXTS, {"model": NAME, "prompt": "a", "n": 9}, 400, None),
    "an unknown field": (TEXTS, {"model": NAME, "prompt": "a", "x": 1}, 400, "x"),
    "an unserved field": (
        CHATS,
        {"model": NAME, "messages": [], "tools": [1]},
        400,
        "tools",
    ),
    "another model": (TEXTS, {"model": "gpt", "prompt": "a"}, 404, "model"),
}


@pytest.mark.parametrize(("path", "body", "status", "field"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused_as_openai_words_it_and_harm_nobody(
    client, path, body, status, field
):
    response = client.ask(path, body)
    error = response.json["error"]
    assert response.status == error["code"] == status
    assert error["type"] == "invalid_request_error" and error["param"] == field
    assert error["message"] and "\n" not in error["message"]
    assert client.served.worker.is_well


def test_a_full_server_says_when_to_come_again_and_then_answers():
    engine = Counting()
    with serving(make_served(engine)) as client:
        engine.may_step.clear()
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            asked = [pool.submit(client.complete, "a", max_tokens=3) for _ in range(5)]
            wait_until(lambda: client.served.worker._count == 5)
            with pytest.raises(urllib.error.HTTPError) as refused:
                client.open(TEXTS, {"model": NAME, "prompt": "a"})
            assert refused.value.code == 429
            assert int(refused.value.headers["retry-after"]) >= 1
            assert json.loads(refused.value.read())["error"]["code"] == 429
            refused.value.close()
            engine.may_step.set()
            assert all(answer.result()["choices"] for answer in asked)
        assert client.complete("a", max_tokens=3)["choices"]
        assert client.served.meter.totals().refused[429] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_of_the_server_or_the_request_ends_an_answer(stream):
    endless = {"model": NAME, "prompt": "a", "stream": stream, "max_tokens": 60}
    engine = Counting()
    with serving(make_served(engine, deadline_seconds=0.2)) as client:
        engine.may_step.clear()
        for fields in ({}, {"deadline_seconds": 0.05}):
            late = client.ask(TEXTS, endless | fields)
            assert late.status == late.json["error"]["code"] == 504
        engine.may_step.set()
        wait_until(lambda: not engine.asked)
        assert client.complete("a", max_tokens=3)["choices"]


def test_a_stream_that_has_begun_tells_of_its_deadline_and_ends():
    engine = Counting(pause=0.01)
    with serving(make_served(engine, deadline_seconds=0.3, max_length=10**6)) as client:
        *sent, last = client.stream(TEXTS, prompt="a", max_tokens=10**5)
        assert sent and last["error"]["code"] == 504
        wait_until(lambda: not engine.asked)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_place(stream):
    engine = Counting(pause=0.001)
    with serving(make_served(engine, max_length=10**6)) as client:
        asked = {"model": NAME, "prompt": "a", "max_tokens": 10**5, "stream": stream}
        body = json.dumps(asked).encode()
        parts = urllib.parse.urlsplit(client.url)
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            head = f"POST {TEXTS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: engine.asked)
            if stream:
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
        wait_until(lambda: not engine.asked)
        wait_until(lambda: not client.served.worker._count)
        assert client.complete("a", max_tokens=3)["choices"]


def test_a_client_that_reads_nothing_loses_its_place_and_little_memory_is_held():
    engine = Counting()
    served = make_served(engine, max_length=10**9)
    form = {"model": NAME, "prompt": "a", "max_tokens": 10**8, "stream": True}
    body = json.dumps(form).encode()
    sent: list[int] = []

    async def ask() -> None:
        received = iter([{"type": "http.request", "body": body, "more_body": False}])
        gone = asyncio.Event()

        async def receive():
            if message := next(received, None):
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(len(message.get("body", b"")))
            if len(sent) > 1:  # as a transport whose buffer is full
                await asyncio.to_thread(wait_until, lambda: not engine.asked)
                gone.set()
                await asyncio.sleep(PATIENCE)

        scope = {"type": "http", "method": "POST", "path": TEXTS, "headers": []}
        await make_app(served)(scope | {"query_string": b""}, receive, send)

    asyncio.run(ask())
    assert len(sent) == 2
    served.worker.close()


def test_a_failed_engine_is_told_of_by_health_and_by_every_answer(caplog):
    engine = Counting()
    with serving(make_served(engine)) as client:
        engine.failure = RuntimeError("a device is gone")
        for _ in range(2):
            failed = client.ask(TEXTS, {"model": NAME, "prompt": "a"})
            assert failed.status == 503 and "device" not in failed.text
        assert client.ask("/health").status == 503
        assert client.ask("/metrics").status == 200


def test_a_mistake_of_ours_is_a_500_that_tells_nothing(monkeypatch, caplog):
    with serving(make_served(Counting())) as client:
        monkeypatch.setattr(client.served.meter, "prometheus", lambda: 1 / 0)
        response = client.ask("/metrics")
    assert response.status == response.json["error"]["code"] == 500
    assert "division" not in response.text
