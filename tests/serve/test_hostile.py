"""Hostile clients of a server that others reach (`pytest -m serving`)."""

import pytest

from experiments.benchmarks.hostile import measure
from tests.serve.client import NAME, PROMPTS, greedy
from tests.serve.tls import certificate

pytestmark = pytest.mark.serving
KEYS = ("first-key-of-tests", "second-key-of-tests")
GROWTH_MIB = 64


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    directory = tmp_path_factory.mktemp("access")
    path = certificate(directory, "own")
    (directory / "keys").write_text("\n".join(KEYS))
    settings = [
        "host=0.0.0.0",
        f"key_file={directory / 'keys'}",
        f"tls_certificate={path}.pem",
        f"tls_key={path}.key",
        "limits.header_seconds=2",
        "limits.body_seconds=3",
        "limits.new_tokens=900",
    ]
    with start(*(f"--set={setting}" for setting in settings)) as server:
        url = server.url.replace("http:", "https:")
        yield server._replace(url=url, key=KEYS[0])


def test_each_key_opens_what_others_do_not_reach(server):
    for key in KEYS:
        (model,) = server._replace(key=key).ask("/v1/models").json["data"]
        assert model["id"] == NAME
    for key in (None, "another-key-of-tests"):
        stranger = server._replace(key=key)
        assert stranger.ask("/health").status == 200
        for path in ("/v1/models", "/metrics", "/scale_elastic_ep"):
            assert stranger.ask(path).status == 401
        assert stranger.ask("/v1/completions", greedy("x", 1)).status == 401


def test_no_key_is_shown(server):
    server.ask("/v1/completions", greedy("x", 1))
    said = server.log.read_text() + server.ask("/metrics").text
    assert not any(key in said for key in KEYS)


def test_an_answer_is_no_longer_than_the_limit_even_if_none_is_asked_for(server):
    chat = {"model": NAME, "messages": [{"role": "user", "content": "7"}]}
    said = server.ask("/v1/chat/completions", chat | {"ignore_eos": True}).json
    assert said["usage"]["completion_tokens"] == 900
    refused = server.ask("/v1/completions", greedy(PROMPTS[0], 901))
    assert "max_tokens=901 must be at most 900" in refused.text


def test_300_hostile_requests_harm_nobody_and_leave_no_memory_taken(server):
    import psutil

    processes = psutil.Process(server.process.pid).children(recursive=True)
    pids = [server.process.pid, *(process.pid for process in processes)]
    measure(server.url, key=server.key, pids=pids)  # memory that is used again
    measured = measure(server.url, key=server.key, pids=pids)
    assert measured["failed"] == 0 and measured["alive"] == 1, measured
    assert measured["served"] == measured["normal"] > 10, measured
    assert measured["rss_growth_mib"] < GROWTH_MIB, measured
