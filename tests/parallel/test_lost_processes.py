"""When one of several processes dies or fails, the others end, and say which it was.

And none leaves while another one's devices still need its own.
"""

import pathlib
import socket
import time

import pytest

from jmoe.parallel import processes
from tests import several_processes
from tests.parallel import leaving_program, lost_program
from tests.several_processes import Copy

# JAX alone takes 100 s to notice, or a lifetime.
IN_TIME_S = 60


@pytest.fixture(scope="module")
def start_two():
    with several_processes.program_of_two(lost_program.__name__) as start:

        def start_two(stage: str, directory: pathlib.Path) -> list[Copy]:
            address = several_processes.free_address()
            return start([[stage, address, index, str(directory)] for index in "01"])

        yield start_two


def wait_until_ready(running: list[Copy]) -> None:
    for process in running:
        while "ready" not in process.out.read_text():
            assert process.start.code() is None, "ended before it was ready"
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("stage", "victim"), [("start", 1), ("compile", 0), ("step", 1), ("save", 0)]
)
def test_a_process_that_is_killed_is_named_by_the_other(
    start_two, stage, victim, tmp_path
):
    running = start_two(stage, tmp_path)
    wait_until_ready(running)
    time.sleep(0.3)
    running[victim].start.kill()
    survivor = running[1 - victim].ended(IN_TIME_S)
    who = f"process {victim} ({socket.gethostname()}, pid {running[victim].start.pid})"
    expected = f"error: {who} is missing: it has ended, or its host.\n"
    assert (survivor.err, survivor.code) == (expected, processes.MISSING)


def test_a_process_that_fails_in_mid_step_ends_the_other_with_its_reason(
    start_two, tmp_path
):
    zero, one = (process.ended(IN_TIME_S) for process in start_two("fail", tmp_path))
    reason = "[Errno 5] Input/output error: 'data'"
    assert (one.err, one.code) == (f"error: {reason}\n", 1)
    assert zero.err == f"error: process 1: {reason}\n" and zero.code in (1, 2)


def test_processes_leave_together_when_all_their_devices_are_done():
    address = several_processes.free_address()
    program = leaving_program.__file__
    running = [several_processes.start([program, address, index]) for index in "01"]
    zero, one = several_processes.ended(running, IN_TIME_S)
    assert (zero.code, one.code) == (0, 0) and zero.out == one.out
    before, after, value = zero.out.split()
    assert (before, after) == ("False", "True")
    assert float(value) == 2
