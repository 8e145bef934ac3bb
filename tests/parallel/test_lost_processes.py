"""When one of several processes dies or fails, the others end, and say which it was."""

import pathlib
import socket
import subprocess
import time

import pytest

from jmoe.parallel import processes
from tests import several_processes
from tests.parallel import lost_program

PROGRAM = pathlib.Path(lost_program.__file__)
# JAX alone takes 100 s to notice, or a lifetime.
IN_TIME_S = 60


def start_two(stage: str, directory: pathlib.Path) -> list[subprocess.Popen]:
    address = several_processes.free_address()
    arguments = [PROGRAM, stage, address]
    return [
        several_processes.start([*arguments, str(index), directory]) for index in (0, 1)
    ]


def wait_until_ready(running: list[subprocess.Popen]) -> None:
    for process in running:
        assert process.stdout is not None
        while "ready" not in (line := process.stdout.readline()):
            assert line, "ended before it was ready"


@pytest.mark.parametrize(
    ("stage", "victim"), [("start", 1), ("compile", 0), ("step", 1), ("save", 0)]
)
def test_a_process_that_is_killed_is_named_by_the_other(stage, victim, tmp_path):
    running = start_two(stage, tmp_path)
    wait_until_ready(running)
    time.sleep(0.3)
    running[victim].kill()
    survivor = several_processes.ended(running, IN_TIME_S)[1 - victim]
    who = f"process {victim} ({socket.gethostname()}, pid {running[victim].pid})"
    expected = f"error: {who} is missing: it has ended, or its host.\n"
    assert (survivor.err, survivor.code) == (expected, processes.MISSING)


def test_a_process_that_fails_in_mid_step_ends_the_other_with_its_reason(tmp_path):
    zero, one = several_processes.ended(start_two("fail", tmp_path), IN_TIME_S)
    reason = "[Errno 5] Input/output error: 'data'"
    assert (one.err, one.code) == (f"error: {reason}\n", 1)
    assert zero.err == f"error: process 1: {reason}\n" and zero.code in (1, 2)
