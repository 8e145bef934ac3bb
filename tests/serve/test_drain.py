"""SIGTERM, with two replicas; it needs vLLM and Ray (`pytest -m serving`)."""

import signal

import pytest

from tests.serve.client import PROMPTS, events, greedy

pytestmark = pytest.mark.serving
LONG = 1000


def test_sigterm_finishes_what_is_in_flight_and_refuses_the_rest(start):
    import psutil

    with start("--set=min_replicas=2", "--set=max_replicas=2") as server:
        server.wait_for(lambda: len(server.measured("vllm:num_requests_running")) == 2)
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
