"""Our engine on two processes: process 0 serves, and both compute. Takes a minute."""

import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from experiments.benchmarks.serve_servers import is_well
from jmoe.config import override
from jmoe.decode.engine import Engine
from jmoe.decode.limits import Limits
from jmoe.decode.requests import Sampling
from jmoe.export import hf
from jmoe.parallel import processes
from jmoe.train import runtime
from tests import several_processes
from tests.decode.conftest import random_variables
from tests.serve.client import Server, events, greedy
from tests.serve.own import tokenizer
from tests.smallest_run import get_config

pytestmark = pytest.mark.long
MESH = ("engine.tensor_parallel=2", "engine.pipeline_parallel=2")
# Few sizes of steps, as each is a program to compile.
SIZES = ("engine.max_sequences=4", "engine.max_length=128", "engine.cache_gib=0.01")
PROMPTS = [[1, 2, 3], [7] * 20, [5, 9, 70], [0, 34, 132, 62, 255]]
NEW = 24


@pytest.fixture(scope="module")
def model():
    cfg = override(get_config().model, ["max_positions=128"])
    return cfg, random_variables(cfg)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    tokenizer().save(made / "tokenizer.json")
    hf.save(made / "two", *model, tokenizer=made / "tokenizer.json")
    return made / "two"


@contextlib.contextmanager
def started(directory, *settings: str) -> Iterator[list[subprocess.Popen]]:
    """Both processes."""
    script = several_processes.ROOT / "scripts" / "serve.py"
    command = [
        *(script, f"--model={directory}", "--engine=jax", "--local"),
        *(f"--set={setting}" for setting in (*MESH, *SIZES, *settings)),
        *(f"--coordinator={several_processes.free_address()}", "--num_processes=2"),
    ]
    running = [
        several_processes.start([*command, f"--process_id={index}"]) for index in (0, 1)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            print(process.communicate()[1][-2000:])  # shown if a test has failed


@contextlib.contextmanager
def serving(directory, log) -> Iterator[tuple[Server, list[subprocess.Popen]]]:
    """Process 0's server, once it is well, and both processes."""
    log.touch()
    address = several_processes.free_address()
    port = address.rpartition(":")[2]
    with started(directory, f"port={port}", "name=squares") as running:
        server = Server(running[0], f"http://{address}", log)
        server.wait_for(lambda: is_well(server.url))
        yield server, running


@pytest.fixture(scope="module")
def two(directory, tmp_path_factory):
    with serving(directory, tmp_path_factory.mktemp("log") / "log") as two:
        yield two


def test_answers_are_those_of_one_process(two, model):
    server, _ = two
    limits = Limits(rows=(1,), prompts=(1,), chunks=(64,), max_length=128)
    engine = Engine(*model, limits)
    for prompt in PROMPTS:
        (alone,) = engine.complete([(prompt, Sampling(max_new_tokens=NEW))])
        assert server.complete(prompt, NEW) == alone.tokens
    at_once = server.ask("/v1/completions", greedy(PROMPTS, NEW)).json["choices"]
    assert [choice["token_ids"] for choice in at_once] == [
        server.complete(prompt, NEW) for prompt in PROMPTS
    ]


def test_a_process_that_dies_ends_the_server_which_says_so(directory, tmp_path):
    with serving(directory, tmp_path / "log") as (server, running):
        running[1].kill()
        zero, _ = several_processes.ended(running, timeout_s=60)
        assert zero.code == processes.MISSING
        assert f"process 1 ({socket.gethostname()}, pid {running[1].pid})" in zero.err
        assert not is_well(server.url)


def test_sigterm_that_all_get_is_heeded_by_process_0_for_all(two):
    """As from a launcher. It ends the servers of the tests above."""
    server, running = two
    stream = server.open("/v1/completions", greedy(PROMPTS[0], 120, stream=True))
    for process in running[::-1]:
        process.send_signal(signal.SIGTERM)
    *pieces, done = events(stream)
    assert done == "[DONE]"
    assert sum(len(x["choices"][0]["token_ids"]) for x in pieces) == 120
    zero, one = several_processes.ended(running)
    assert (zero.code, one.code) == (0, 0), (zero, one)
    assert "Stopped." in zero.out


def test_fewer_devices_than_the_processes_have_are_refused(directory):
    with started(directory, "engine.tensor_parallel=1") as running:
        zero, one = several_processes.ended(running)
    assert zero.code == one.code == runtime.MISTAKE
    assert "= 2 devices must be all 4 that the 2 processes have" in zero.err
