"""Our engine on two processes: process 0 serves, and both compute. Takes a minute."""

import contextlib
import json
import re
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
from jmoe.export import hf, safetensors
from jmoe.parallel import processes
from jmoe.train import runtime
from tests import several_processes
from tests.decode.conftest import random_variables
from tests.serve.client import Server, events, greedy
from tests.serve.own import tokenizer
from tests.smallest_run import get_config

pytestmark = pytest.mark.long
# Of one group, so that an expert may be on any device.
MODEL = (
    "max_positions=128",
    *("moe.router.num_groups=1", "moe.router.groups_per_token=1"),
)
MESH = ("engine.tensor_parallel=2", "engine.pipeline_parallel=2")
# Experts on the devices of both, which go elsewhere whenever they may.
RESTLESS = {
    "actions": ("place", "drop", "admit"),
    "device_rows": 10**6,  # so that nothing is dropped
    "window_steps": 8,
    "cool_down": 1,
    "uneven_above": 0.02,
    "uneven_below": 0.01,
    "horizon_steps": 10**9,
}
EXPERTS = (
    *("engine.tensor_parallel=4", "engine.pipeline_parallel=1"),
    *("engine.expert_parallel=True", "engine.spare_experts=4"),
    f"engine.controller={RESTLESS}",
)
# Few sizes of steps, as each is a program to compile.
SIZES = ("engine.max_sequences=4", "engine.max_length=128", "engine.cache_gib=0.01")
PROMPTS = [[1, 2, 3], [7] * 20, [5, 9, 70], [0, 34, 132, 62, 255]]
NEW = 24
# The program, which says at its end how many bytes of which tensor it has read.
COUNTING = """
import collections, json
from jmoe.commands import serve
from jmoe.export.read import Reader

part, read = Reader._part, []

def counting(self, name, *index):
    x = part(self, name, *index)
    read.append((name, x.nbytes))
    return x

Reader._part = counting
try:
    serve.start()
finally:
    sizes = collections.Counter()
    for name, size in read:
        sizes[name] += size
    print(json.dumps(sizes))
"""


@pytest.fixture(scope="module")
def model():
    cfg = override(get_config().model, MODEL)
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
    command = [
        *("-c", COUNTING, f"--model={directory}", "--engine=jax", "--local"),
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
def serving(
    directory, log, *settings: str
) -> Iterator[tuple[Server, list[subprocess.Popen]]]:
    """Process 0's server, once it is well, and both processes."""
    log.touch()
    address = several_processes.free_address()
    port = address.rpartition(":")[2]
    settings = (f"port={port}", "name=squares", *settings)
    with started(directory, *settings) as running:
        server = Server(running[0], f"http://{address}", log)
        server.wait_for(lambda: is_well(server.url))
        yield server, running


@pytest.fixture(scope="module")
def two(directory, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(directory, log, *EXPERTS) as two:
        yield two


@pytest.fixture(scope="module")
def alone(model) -> list[list[int]]:
    """The tokens that one device finds."""
    limits = Limits(rows=(1,), prompts=(1,), chunks=(64,), max_length=128)
    engine, sampling = Engine(*model, limits), Sampling(max_new_tokens=NEW)
    done = sorted(
        engine.complete((prompt, sampling) for prompt in PROMPTS),
        key=lambda completion: completion.number,
    )
    return [completion.tokens for completion in done]


def test_answers_are_those_of_one_process_wherever_experts_are(two, alone):
    server, _ = two
    assert [server.complete(prompt, NEW) for prompt in PROMPTS] == alone

    def have_moved() -> bool:
        at_once = server.ask("/v1/completions", greedy(PROMPTS, NEW)).json["choices"]
        assert [choice["token_ids"] for choice in at_once] == alone
        page = server.ask("/metrics").text
        moved = re.findall(r"^jmoe_experts_moved_total\S* (\S+)$", page, re.M)
        return float(*moved) > 0

    server.wait_for(have_moved)
    assert have_moved()  # and answers are the same behind it


def test_a_process_that_dies_ends_the_server_which_says_so(directory, alone, tmp_path):
    with serving(directory, tmp_path / "log") as (server, running):
        assert [server.complete(prompt, NEW) for prompt in PROMPTS] == alone
        running[1].kill()
        zero, _ = several_processes.ended(running, timeout_s=60)
        assert zero.code == processes.MISSING
        assert f"process 1 ({socket.gethostname()}, pid {running[1].pid})" in zero.err
        assert not is_well(server.url)


def test_sigterm_is_heeded_by_process_0_and_each_has_read_its_own_experts(
    two, directory
):
    """A launcher sends it to all. It ends the server of the first test."""
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
    stored = {
        name: found.nbytes
        for name, found in safetensors.read_headers(directory).items()
        if ".experts." in name
    }
    for process in (zero, one):
        read = json.loads(process.out.splitlines()[-1])
        own = sum(read.get(name, 0) for name in stored)
        # In 6 of 12 places of a layer with 8 experts; of the MTP module's 8, 4.
        assert own == sum(stored.values()) * (6 + 4) / (8 + 8)


def test_fewer_devices_than_the_processes_have_are_refused(directory):
    with started(directory, "engine.tensor_parallel=1") as running:
        zero, one = several_processes.ended(running)
    assert zero.code == one.code == runtime.MISTAKE
    assert "= 2 devices must be all 4 that the 2 processes have" in zero.err
