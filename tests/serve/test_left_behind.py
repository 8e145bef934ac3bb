"""A server holds no more after many requests than after few."""

import gc

from tests.serve.counting import Counting
from tests.serve.own import NAME, make_served, serving
from tests.serve.running import wait_until

TEXTS = "/v1/completions"


def test_requests_leave_nothing_behind_whatever_becomes_of_them(monkeypatch):
    asked = {"model": NAME, "prompt": "a", "max_tokens": 3}
    kinds = ({}, {"stream": True}, {"n": 2}, {"n": 99}, {"x": 1}, {"model": "gpt"})
    times = 30

    def ask_all(client):
        """As many objects as there are once all are answered."""
        for _ in range(times):
            for fields in (*kinds, {"deadline_seconds": 1e-9}):
                client.ask(TEXTS, asked | fields)
            client.ask("/metrics")
        wait_until(lambda: not client.served.worker._count)
        gc.collect()
        return len(gc.get_objects())

    with serving(make_served(Counting())) as client:
        monkeypatch.setattr(client.served.meter, "_clock", lambda: 0.0)
        before = ask_all(client)
        grown = ask_all(client) - before
    assert grown < times  # not even one for each seventh request
