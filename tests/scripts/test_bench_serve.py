"""The suite of the served model tells what became of requests, whatever they met."""

import asyncio
import itertools
import json
import socket
import threading
import time
from typing import Any

import pytest

from experiments.benchmarks import (
    hostile,
    serve,
    serve_model,
    serve_overload,
    serve_servers,
)
from experiments.benchmarks import serve_speed as speed
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.hostile_requests import CLOSED, HUNG, Target
from experiments.benchmarks.report import Figure
from experiments.benchmarks.serve_clients import Answer, arriving, summary, together
from experiments.benchmarks.serve_model import NEAR_TIE, Ask, Reference, differs
from experiments.benchmarks.serve_servers import Server
from jmoe.config import override
from jmoe.config.serve import ServeConfig
from tests.serve.running import address, running

TOKENS = [5, 6, 7, 8]


async def engine(scope: Any, receive: Any, send: Any) -> None:
    """Streams TOKENS, in three pieces, or does what the prompt says instead."""
    asked = json.loads((await receive())["body"])
    prompt, tokens = asked["prompt"], TOKENS[: asked["max_tokens"]]
    status = 429 if prompt == "refuse" else 200
    await send({"type": "http.response.start", "status": status, "headers": []})

    async def say(text: str, more: bool = True) -> None:
        body = {"type": "http.response.body", "body": text.encode(), "more_body": more}
        await send(body)

    if prompt == "refuse":
        return await say('{"error": "full"}', more=False)
    for part in (tokens[:1], tokens[1:3], tokens[3:]):
        choice = {"text": "x" * len(part), "token_ids": part}
        event = f"data: {json.dumps({'choices': [choice]})}\n\n"
        await say(event[:9])
        await say(event[9:])
        await asyncio.sleep({"slow": 1.0, "wait": 0.2}.get(prompt, 0.0))
        if prompt == "break":
            raise OSError("broken")
    if prompt == "fail":
        await say('data: {"error": {"message": "The deadline is over."}}\n\n')
    await say("data: [DONE]\n\n", more=prompt == "endless")


def page(*counts: int) -> Any:
    """Returns an app with metrics: so many requests run, in the end the last number."""
    left = itertools.chain(counts, itertools.repeat(counts[-1]))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        count = next(left)
        lines = (
            "# HELP jmoe_requests_running Requests.",
            f"jmoe_requests_running {count}",
        )
        text = "\n".join((*lines, f"jmoe_requests_waiting {2 * count}.0", "other 9"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    return app


@pytest.mark.parametrize(("counts", "left"), [((1, 0), 0), ((1,), 3)])
def test_requests_that_a_server_still_has_are_counted_once_it_had_time(
    counts, left, monkeypatch
):
    monkeypatch.setattr(serve_servers, "_SETTLE_S", 0.5)
    with running(page(*counts), http="h11") as server:
        host, port = address(server)
        url = f"http://{host}:{port}"
        assert (
            serve_servers.unfinished(Server(url, Target(host, port, False, None), []))
            == left
        )


@pytest.fixture(scope="module")
def target():
    with running(engine, http="h11") as server:
        yield Target(*address(server), False, None, "m")


def ask_all(target, *prompts: str, at_once=2, patience=60.0) -> list[Answer]:
    asks = [Ask(prompt, 4) for prompt in prompts]
    answers = asyncio.run(together(target, asks, at_once, patience))
    return sorted(answers, key=lambda answer: prompts.index(answer.ask.prompt))


def test_a_client_tells_what_it_was_sent_and_when(target):
    (answer,) = ask_all(target, "wait")
    assert answer.is_whole and (answer.tokens, answer.text) == (TOKENS, "xxxx")
    first, within, last = answer.gaps
    # What comes late makes the next gap shorter than the server's.
    assert first > 0.1 and within == 0.0 and last > 0.1
    assert answer.begun < answer.first < answer.ended
    assert 0.6 <= answer.seconds < 30


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [
    *(b'data: {"choices": [{"text": "x", "token_ids": [%d]}]}\n\n' % x for x in TOKENS),
    b"data: [DONE]\n\n",
]


@pytest.mark.parametrize(
    "sent",
    [
        CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(x), x) for x in [*EVENTS, b""]),
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(b"".join(EVENTS))
        + b"".join(EVENTS),
    ],
    ids=["chunks", "whole"],
)
def test_a_client_reads_what_comes_byte_by_byte(sent):
    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.recv(2**16)
            for byte in sent:
                connection.sendall(bytes([byte]))
                time.sleep(2e-4)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        (answer,) = ask_all(Target(*listening.getsockname(), False, None, "m"), "p")
        thread.join()
    assert answer.is_whole and (answer.tokens, answer.text) == (TOKENS, "xxxx")


def test_a_client_goes_on_behind_what_is_no_whole_answer(target):
    prompts = ("refuse", "break", "fail", "fine")
    refused, broken, failed, fine = ask_all(target, *prompts, at_once=1)
    assert (refused.status, refused.tokens) == (429, []) and "full" in refused.error
    assert broken.status == 200 and broken.error
    assert "deadline is over" in failed.error
    assert [x.is_whole for x in (refused, broken, failed, fine)] == [False] * 3 + [True]


def test_a_server_that_says_nothing_or_is_not_there_is_told_apart(target):
    (slow,) = ask_all(target, "slow", patience=0.3)
    assert slow.status == HUNG and slow.seconds < 0.9
    (gone,) = ask_all(target._replace(port=1), "fine")
    assert gone.status == CLOSED and gone.error


def test_arrivals_wait_for_nobody(target):
    asks = itertools.cycle([Ask("wait", 4)])
    answers = asyncio.run(arriving(target, asks, 50.0, 1.0, 60.0))
    begun = [answer.begun for answer in answers]
    assert len(answers) > 20
    assert max(begun) - min(begun) < 0.5 * 0.6 * len(answers)  # one takes 0.6 s
    assert all(answer.is_whole for answer in answers)


def answer(status=200, tokens=TOKENS, error="", seconds=1.0) -> Answer:
    ask = Ask("p", len(TOKENS))
    return Answer(ask, status, "", tokens, 0.0, 0.5, seconds, [], error)


EXPECTED = Reference(TOKENS, [1.0, NEAR_TIE / 2, 1.0, 1.0])
LATE = serve_overload.DEADLINE + serve_overload.MARGIN + 0.1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (answer(), "answered"),
        (answer(tokens=[5, 9, 9, 9]), "answered"),  # by a near tie
        (answer(tokens=[9, 6, 7, 8]), "wrong"),
        (answer(tokens=[5, 6, 9, 8]), "wrong"),
        (answer(429, [], "full"), "refused"),
        (answer(504, [], "late"), "refused"),
        (answer(200, [5], "The answer wasn't there by its deadline."), "refused"),
        (answer(200, [5], "It has no end."), "lost"),
        (answer(500, [], "no"), "lost"),
        (answer(CLOSED, [], "ConnectionResetError"), "lost"),
        (answer(HUNG, [], "It took long."), "lost"),
        (answer(seconds=LATE), "late"),
        (answer(429, [], "full", seconds=LATE), "late"),
    ],
)
def test_what_becomes_of_a_request_under_overload_has_one_name(given, expected):
    assert serve_overload.outcome(given, EXPECTED) == expected


def test_an_answer_that_stops_early_is_another_one():
    assert not differs(TOKENS, EXPECTED)
    assert differs(TOKENS[:3], EXPECTED)


def test_a_summary_is_of_all_answers_together():
    one = answer()._replace(gaps=[0.1] * 99)
    two = answer(seconds=3.0)._replace(gaps=[0.7], begun=1.0, first=2.0)
    found = summary([one, two])
    assert (found["tokens"], found["seconds"]) == (8, 3.0)
    assert found["tokens_per_second"] == pytest.approx(8 / 3)
    assert (found["gap_p50"], found["gap_p99"]) == (0.1, 0.1)
    assert (found["first_p50"], found["first_p99"]) == (0.5, 1.0)
    assert hostile.percentile([3, 1, 2], 100) == 3


def test_no_prompt_comes_twice_and_all_lengths_are_within_bounds():
    document = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(500))
    found = list(serve_model.pieces(document))
    assert len(set(found)) == len(found) > 30
    lengths = list(map(len, found))
    assert min(lengths) >= serve_model.SHORTEST and max(lengths) <= serve_model.LONGEST
    assert max(lengths) > 4 * min(lengths)


def test_each_number_at_once_has_all_requests_once_over_its_rounds():
    asks = (Ask(str(i), 4) for i in itertools.count())
    batches = speed.plan(asks, requests=7, rounds=3)
    for at_once in speed.AT_ONCE:
        of_it = [batch for batch in batches.values() if batch.at_once == at_once]
        assert [len(batch.asks) for batch in of_it] == [3, 2, 2]
    prompts = [ask.prompt for batch in batches.values() for ask in batch.asks]
    assert len(set(prompts)) == len(prompts) == 21


def test_servers_are_compared_round_by_round_and_broken_answers_are_named(
    target, monkeypatch
):
    class Servers(dict):
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    server = Server("", target, [])
    monkeypatch.setattr(
        speed, "_servers", lambda sides, say: Servers(dict.fromkeys(sides, server))
    )
    monkeypatch.setattr(speed.serve_servers, "needed", lambda side: [])
    monkeypatch.setattr(speed, "_PAUSE_SECONDS", 0.0)
    asks = (Ask("refuse" if i == 9 else str(i), 4) for i in itertools.count())
    part = speed.against(asks, 6, 2, ("ours", "vllm"), lambda _: None)
    figures = {figure.name: figure for figure in part.figures}
    for at_once in speed.AT_ONCE:
        assert figures[f"ours / vllm, {at_once} at once"].at_least == 1.2
        assert figures[f"ours / vllm, between tokens, {at_once} at once, p99"].at_most
    assert len(part.wrong) == 2 and all("429" in line for line in part.wrong)


def test_parts_that_are_not_measured_stay_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "RESULTS", tmp_path)
    monkeypatch.setattr(serve, "DIRECTORY", tmp_path)
    values = iter([1.0, 2.0, 3.0])

    def part(*_):
        figure = Figure(name="f", value=next(values), unit="", definition="")
        return Part([figure], {}, {"seen": figure.value}, ("bad",))

    for name in ("http", "hostile"):
        monkeypatch.setitem(serve.PARTS, name, part)
    both = override(serve.Settings(), ["parts=('hostile', 'http')"])
    serve.run(1, lambda _: None, both).write(tmp_path)
    one = override(serve.Settings(), ["parts=('hostile',)"])
    report = serve.run(1, lambda _: None, one)
    assert [figure.value for figure in report.figures] == [2.0, 3.0]
    assert report.samples["http"]["samples"] == {"seen": 2.0}
    assert report.wrong == ("bad", "bad")


def test_the_controller_is_told_to_act_and_not_to():
    told = {
        name: override(ServeConfig(), settings).engine.controller
        for name, settings in serve.CONTROLLED.items()
    }
    controlled, uncontrolled = told["controlled"], told["uncontrolled"]
    assert controlled is not None and controlled.wait_seconds and controlled.actions
    assert uncontrolled is not None and not uncontrolled.actions


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parts=('speed',)", "parts has 'speed', not one of 'against'"),
        ("sides=('ours', 'theirs')", "sides has 'theirs', not one of 'ours'"),
        ("sides=('vllm',)", "must have 'ours'"),
        ("seconds=0", "seconds=0.0 must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        override(serve.Settings(), [setting])
