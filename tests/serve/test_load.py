"""More load, and SIGTERM under load; it needs vLLM and Ray (`pytest -m serving`)."""

import pytest

from tests.serve.client import PROMPTS

pytestmark = pytest.mark.serving
LONG = 1000
RUNNING = "vllm:num_requests_running"


@pytest.fixture(scope="module")
def server(start):
    with start("--set=max_replicas=2", "--set=requests_per_replica=1") as server:
        yield server


def test_load_above_a_replicas_share_brings_another(server):
    assert len(server.measured(RUNNING)) == 1
    server.ask_until(lambda: len(server.measured(RUNNING)) == 2, PROMPTS[0], LONG)


def test_sigterm_finishes_what_is_in_flight_and_refuses_the_rest(server):
    import psutil

    started = psutil.Process(server.process.pid).children(recursive=True)
    server.drain_and_check(PROMPTS[2], LONG)
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
