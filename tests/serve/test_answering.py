"""Answers put together of what a worker tells, with no model behind it."""

import json

from jmoe.serve.answering import Answering, TextForm
from jmoe.serve.worker import Increment
from tests.serve.counting import Counting
from tests.serve.own import NAME, make_served, serving


def test_choices_are_in_their_order_whichever_ends_first():
    served = make_served(Counting())
    body = json.dumps({"model": NAME, "prompt": ["a", "b"], "max_tokens": 9})
    answering = Answering(served, TextForm, body.encode())
    last = Increment(1, [ord("x")], [0.0], [], "stop")
    first = Increment(0, [ord("y")] * 2, [0.0] * 2, [], "length")
    choices = answering.whole([last, first]).choices
    served.worker.close()
    assert [choice.index for choice in choices] == [0, 1]
    assert [choice.finish_reason for choice in choices] == ["length", "stop"]
    assert [len(choice.text) for choice in choices] == [2, 1]


def test_a_chat_needs_a_template_and_completions_none():
    served = make_served(Counting(), template=None)
    with serving(served) as client:
        chat = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
        refused = client.ask("/v1/chat/completions", chat)
        assert refused.status == 400 and "no chat template" in refused.text
        assert client.complete("a", max_tokens=2)["choices"]
