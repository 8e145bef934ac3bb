"""Our engine's replicas on Ray as clients see them (`pytest -m serving`)."""

import os
import re
import signal
import subprocess
import sys

import pytest

from jmoe.decode.generate import generate
from jmoe.train import runtime
from tests.serve.client import PROMPTS, events, greedy
from tests.serve.conftest import ROOT
from tests.serve.test_app import replica_process

pytestmark = pytest.mark.serving
NEW = 60
LONG = 800
RUNNING = "jmoe_requests_running"
OWN = ("--engine=jax", "--set=max_replicas=2", "--set=requests_per_replica=1")
ROWS = 4  # as many as ask at once in these tests, but for one
DECIDING = (  # when requests wait, not for a step, but for others to end
    f"--set=engine.max_sequences={ROWS}",
    "--set=engine.controller={'actions': ('admit',), 'wait_seconds': 0.05, "
    "'window_steps': 2, 'cool_down': 1}",
)


@pytest.fixture(scope="module")
def server(start, workdir):
    """A run's directory is served: no export is needed."""
    with start(f"--model={workdir}", *OWN, *DECIDING, "--set=name=squares") as server:
        yield server


@pytest.fixture(scope="module")
def expected(trained) -> list[list[int]]:
    return generate(trained.run.model, trained.variables, PROMPTS, max_new_tokens=NEW)


def test_answers_are_the_engines_whole_and_streamed(server, expected):
    for prompt, ours in zip(PROMPTS, expected, strict=True):
        assert server.complete(prompt, NEW) == ours
        with server.open("/v1/completions", greedy(prompt, NEW, stream=True)) as stream:
            *pieces, done = events(stream)
        # Tokens of steps shorter than a hundredth of a second travel together.
        assert done == "[DONE]" and len(pieces) > 1
        assert [t for x in pieces for t in x["choices"][0]["token_ids"]] == ours


def test_a_killed_replica_is_replaced(server, expected):
    (before,) = server.measured(RUNNING)
    os.kill(replica_process(server).pid, signal.SIGKILL)
    server.wait_for(lambda: before not in server.measured(RUNNING))
    assert server.complete(PROMPTS[1], NEW) == expected[1]


def test_load_above_a_replicas_share_brings_another_and_metrics_show_both(server):
    server.ask_until(lambda: len(server.measured(RUNNING)) == 2, PROMPTS[0], LONG)


def test_what_a_replica_decides_is_in_the_servers_log(server):
    asked = greedy(PROMPTS[0], NEW, n=4 * ROWS)
    assert server.ask("/v1/completions", asked).status == 200
    decided = re.compile(r"admit: requests wait for up to .+ requests may wait")
    server.wait_for(lambda: decided.search(server.log.read_text()))


def test_sigterm_finishes_what_is_in_flight_and_refuses_the_rest(server):
    server.drain_and_check(PROMPTS[2], LONG)


def test_more_devices_than_ray_has_are_refused(workdir):
    command = [sys.executable, ROOT / "scripts" / "serve.py", f"--model={workdir}"]
    done = subprocess.run(
        [*command, "--engine=jax", "--set=min_replicas=99", "--set=max_replicas=99"],
        env=os.environ | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == runtime.MISTAKE
    assert "min_replicas=99 of 1 CPUs each need 99; Ray has" in done.stderr
