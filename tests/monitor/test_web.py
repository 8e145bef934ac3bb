"""The app, asked without a network as a server would ask it."""

import asyncio
import base64
import hashlib
import json
import re
import time

import pytest
from prometheus_client import parser

from jmoe.monitor import web
from tests.monitor.watched import Clock, make_meter, step

SECONDS = 30.0  # for what should take none


class Client:
    """One request to an app, whose answer comes in pieces."""

    def __init__(self, app, path, method="GET", host="localhost", root=""):
        headers = [(b"host", host.encode())]
        self._scope = {
            **{
                "type": "http",
                "http_version": "1.1",
                "method": method,
                "headers": headers,
            },
            **{"path": root + path, "root_path": root, "query_string": b""},
            **{"scheme": "http", "server": ("localhost", 80), "client": ("there", 1)},
        }
        self._app = app
        self.status, self.headers, self.body = 0, {}, b""
        self.left = asyncio.Event()
        self.reads = asyncio.Event()  # or else what is sent waits
        self.reads.set()

    async def ask(self):
        await asyncio.wait_for(
            self._app(self._scope, self._receive, self._send), SECONDS
        )
        return self

    async def _receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.body += message.get("body", b"")

    def events(self, name):
        """Returns the data of whole events that have come."""
        blocks = self.body.decode().split("\n\n")[:-1]
        start = f"event: {name}\ndata: "
        return [
            json.loads(b.removeprefix(start)) for b in blocks if b.startswith(start)
        ]


def make_app(meter=None, **options):
    meter = meter or make_meter()
    return web.make_app(meter.snapshot, meter.prometheus, interval=0.01, **options)


def ask(app, *arguments, **options):
    return asyncio.run(Client(app, *arguments, **options).ask())


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


def test_the_page_is_whole_and_its_policy_lets_nothing_else_in():
    answer = ask(make_app(), "/")
    page, policy = answer.body.decode(), answer.headers["content-security-policy"]
    assert answer.status == 200
    for kind in ("style", "script"):
        (inside,) = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    fetched = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert not fetched and "@import" not in page and "url(" not in page


def test_the_metrics_are_in_the_format_of_prometheus():
    answer = ask(make_app(), "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert list(parser.text_string_to_metric_families(answer.body.decode()))


@pytest.mark.parametrize("path", ["/", "/events", "/metrics"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nobody_can_change_anything(path, method):
    assert ask(make_app(), path, method).status == 405


@pytest.mark.parametrize("path", ["/", "/events", "/metrics"])
def test_a_head_has_no_end_to_wait_for(path):
    assert ask(make_app(), path, "HEAD").status == 200


@pytest.mark.parametrize("path", ["/other", "/live/page.js", "/../web.py", "//"])
def test_there_is_nothing_else(path):
    assert ask(make_app(), path).status == 404


def test_a_name_that_is_not_this_machines_gets_no_answer():
    app = make_app(hosts=["localhost"])
    assert ask(app, "/", host="evil.example:80").status == 400
    assert ask(app, "/", host="localhost:8265").status == 200


def test_the_app_works_under_any_path():
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = Starlette(routes=[Mount("/monitor", make_app())])
    assert ask(app, "/monitor/metrics").status == 200
    assert ask(app, "/monitor/").status == 200


def test_events_are_snapshots_that_differ_and_the_time():
    clock = Clock()
    meter = make_meter(clock)

    async def listen():
        client = Client(make_app(meter), "/events")
        asking = asyncio.create_task(client.ask())
        await until(lambda: len(client.events("clock")) >= 3)
        assert len(client.events("snapshot")) == 1  # nothing has changed
        step(meter, live=5)
        await until(lambda: len(client.events("snapshot")) == 2)
        client.left.set()
        await asking
        return client

    client = asyncio.run(listen())
    assert client.headers["content-type"].startswith("text/event-stream")
    idle, busy = client.events("snapshot")
    assert (idle["status"], busy["status"]) == ("idle", "5 running, 0 waiting")
    assert abs(client.events("clock")[-1] - time.time()) < SECONDS


def test_however_many_listen_a_snapshot_is_made_once():
    made = []
    meter = make_meter()

    def snapshot():
        made.append(1)
        return meter.snapshot()

    async def listen():
        app = web.make_app(snapshot, meter.prometheus, interval=SECONDS)
        clients = [Client(app, "/events") for _ in range(8)]
        asking = [asyncio.create_task(client.ask()) for client in clients]
        await until(lambda: all(client.events("snapshot") for client in clients))
        for client in clients:
            client.left.set()
        await asyncio.gather(*asking)

    asyncio.run(listen())
    assert len(made) == 1


def test_listeners_are_bounded_and_make_room_when_they_leave():
    async def listen():
        app = make_app(max_listeners=2)
        clients = [Client(app, "/events") for _ in range(2)]
        asking = [asyncio.create_task(client.ask()) for client in clients]
        await until(lambda: all(client.events("clock") for client in clients))
        refused = await Client(app, "/events").ask()
        assert refused.status == 503 and refused.headers["retry-after"]
        clients[0].left.set()
        await asking[0]
        later = Client(app, "/events")
        asking.append(asyncio.create_task(later.ask()))
        await until(lambda: later.events("clock"))
        for client in (*clients, later):
            client.left.set()
        await asyncio.gather(*asking)

    asyncio.run(listen())


def test_a_listener_that_does_not_read_is_dropped():
    async def listen():
        app = make_app(max_listeners=1, stall_seconds=0.1)
        client = Client(app, "/events")
        asking = asyncio.create_task(client.ask())
        await until(lambda: client.events("clock"))
        client.reads.clear()
        await asking  # though it never left
        another = Client(app, "/events")
        asking = asyncio.create_task(another.ask())
        await until(lambda: another.events("clock"))
        another.left.set()
        await asking

    asyncio.run(listen())
