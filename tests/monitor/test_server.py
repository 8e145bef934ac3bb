"""The page of a run behind a real server."""

import http.client
import json
import socket
import threading
import urllib.error
import urllib.request

import pytest

from jmoe.config import MonitorConfig
from jmoe.monitor import server
from tests.monitor.watched import make_meter


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def get(address):
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read().decode()


def test_page_metrics_and_events_are_there_until_the_block_ends(port):
    with server.opened(MonitorConfig(port=port), make_meter()) as address:
        assert address == f"http://127.0.0.1:{port}/"
        assert "<!doctype html>" in get(address)
        assert "jmoe_new_tokens_total" in get(f"{address}metrics")
        with urllib.request.urlopen(f"{address}events", timeout=60) as events:
            assert events.readline() == b"event: snapshot\n"
            data = events.readline().decode().removeprefix("data: ")
            assert json.loads(data)["model"] == "tiny"
    with pytest.raises(urllib.error.URLError):
        get(address)
    assert "monitor" not in {thread.name for thread in threading.enumerate()}


def test_a_listener_does_not_keep_the_run_from_ending(port):
    with server.opened(MonitorConfig(port=port), make_meter()) as address:
        events = urllib.request.urlopen(f"{address}events", timeout=60)
        assert events.readline()
    with events:
        while events.readline():  # up to the end of the stream
            pass


def test_it_listens_on_this_machine_alone_unless_told_otherwise(port):
    with server.opened(MonitorConfig(port=port), make_meter()):
        elsewhere = socket.create_server(("127.0.0.2", port))  # nobody has it
        elsewhere.close()
    with server.opened(MonitorConfig(port=port, host="127.0.0.2"), make_meter()) as at:
        assert at.startswith("http://127.0.0.2:") and get(at)


def test_a_page_of_elsewhere_can_not_read_it_by_another_name(port):
    with server.opened(MonitorConfig(port=port), make_meter()):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics", headers={"host": "evil.example"})
        assert connection.getresponse().status == 400
        connection.close()


def test_a_port_in_use_is_refused_in_one_clear_line_and_left_alone(port):
    cfg = MonitorConfig(port=port)
    with socket.create_server(("127.0.0.1", port)):
        for refusing in (
            lambda: server.check(cfg),
            lambda: server.opened(cfg, make_meter()).__enter__(),
        ):
            with pytest.raises(ValueError, match=f"monitor.port={port} can't be had"):
                refusing()
    server.check(cfg)


def test_an_address_of_no_machine_is_refused():
    with pytest.raises(ValueError, match="monitor.host='no.such.host.invalid'"):
        server.check(MonitorConfig(port=8265, host="no.such.host.invalid"))


def test_without_a_port_there_is_no_server_and_no_library_is_needed(monkeypatch):
    monkeypatch.setattr(server, "_libraries", lambda: pytest.fail("not needed"))
    server.check(MonitorConfig())
    with server.opened(MonitorConfig(), make_meter()) as address:
        assert address == ""


def test_a_library_that_is_missing_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r'uvicorn.*pip install "jmoe\[monitor\]"'):
        server.check(MonitorConfig(port=8265))


def test_requests_that_are_none_leave_it_answering(port):
    with server.opened(MonitorConfig(port=port), make_meter()) as address:
        for said in (b"\0\xff" * 50, b"GET / HTTP/1.1\r\n", b"GET /" + b"a" * 100_000):
            with socket.create_connection(("127.0.0.1", port)) as rude:
                rude.sendall(said)
        assert get(address)
