"""More load, and SIGTERM under load; it needs vLLM and Ray (`pytest -m serving`)."""

import concurrent.futures
import signal
import threading

import pytest

from tests.serve.client import PROMPTS, events, greedy

pytestmark = pytest.mark.serving
LONG = 1000
RUNNING = "vllm:num_requests_running"


@pytest.fixture(scope="module")
def server(start):
    with start("--set=max_replicas=2", "--set=requests_per_replica=1") as server:
        yield server


def test_load_above_a_replicas_share_brings_another(server):
    assert len(server.measured(RUNNING)) == 1
    enough = threading.Event()

    def ask_on():
        while not enough.is_set():
            server.complete(PROMPTS[0], LONG)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        askers = [pool.submit(ask_on) for _ in range(4)]
        try:
            server.wait_for(lambda: len(server.measured(RUNNING)) == 2)
        finally:
            enough.set()
        for asker in askers:
            asker.result()


def test_sigterm_finishes_what_is_in_flight_and_refuses_the_rest(server):
    import psutil

    started = psutil.Process(server.process.pid).children(recursive=True)
    alone = server.complete(PROMPTS[2], LONG)
    body = greedy(PROMPTS[2], LONG, stream=True)
    streams = [server.open("/v1/completions", body) for _ in range(4)]
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.ask("/health").status == 503)
    refused = server.ask("/v1/completions", greedy(PROMPTS[0], 1))
    assert refused.status == 503 and "shutting down" in refused.text
    for stream in streams:
        *pieces, done = events(stream)
        tokens = [t for piece in pieces for t in piece["choices"][0]["token_ids"]]
        assert (done, tokens) == ("[DONE]", alone)
    assert server.process.wait(60) == 0
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
