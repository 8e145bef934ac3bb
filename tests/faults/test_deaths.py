"""A process dies where it is told to, and starts are processes of their own."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.faults import starts

PROGRAM = """
import os, pathlib, sys, threading, time

IMPORTED_BY = os.getpid()


def work(out):
    for count in range(3):
        out.write_text(str(count))
    return out


def start():
    out = pathlib.Path(sys.argv[1])
    thread = threading.Thread(target=work, args=[out])
    thread.start()
    thread.join()
    print(IMPORTED_BY, os.getpid(), sys.argv[2:], flush=True)
    time.sleep(float(sys.argv[2]))
    sys.exit(3)
"""
WRITES = 1 + PROGRAM.splitlines().index("        out.write_text(str(count))")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "a_program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def program(source):
    environment = {"PYTHONPATH": f"{starts.ROOT}:{source.parent}"}
    with starts.Program("a_program", environment=environment) as program:
        yield program


def test_it_dies_at_the_line_for_the_nth_time_in_any_thread(program, source, tmp_path):
    first = "tests.faults.deaths:die_at", str(source), WRITES, 2
    start = program.start([str(tmp_path / "written"), "0"], tmp_path / "out", *first)
    assert start.wait(60) == -signal.SIGKILL
    assert (tmp_path / "written").read_text() == "0"  # the next was to be written
    assert (tmp_path / "out").read_text() == ""


def test_a_line_that_is_not_come_to_so_often_kills_nothing(program, source, tmp_path):
    first = "tests.faults.deaths:die_at", str(source), WRITES, 4
    start = program.start([str(tmp_path / "written"), "0"], tmp_path / "out", *first)
    assert start.wait(60) == 3
    assert (tmp_path / "written").read_text() == "2"


def test_lines_are_counted_as_often_as_they_are_come_to(program, source, tmp_path):
    counted = tmp_path / "lines.json"
    first = "tests.faults.deaths:count_lines", [str(source)], str(counted)
    start = program.start([str(tmp_path / "written"), "0"], tmp_path / "out", *first)
    assert start.wait(60) == 3
    times = {line: n for _, line, n in json.loads(counted.read_text())}
    assert (times[WRITES], times[WRITES - 1], times[WRITES + 1]) == (3, 4, 1)


def test_each_start_is_a_process_of_what_was_imported_once(program, tmp_path):
    pids = set()
    for count in range(2):
        arguments = [str(tmp_path / "written"), "0", str(count)]
        start = program.start(arguments, tmp_path / "out")
        assert start.wait(60) == 3
        parent, pid, said = (tmp_path / "out").read_text().split(maxsplit=2)
        pids |= {parent, pid}
        assert int(pid) == start.pid and eval(said) == arguments[1:]
    assert len(pids) == 3


def test_a_killed_start_is_ended_and_the_next_one_runs(program, tmp_path):
    start = program.start([str(tmp_path / "written"), "600"], tmp_path / "out")
    written, deadline = tmp_path / "written", time.monotonic() + 60
    while not written.exists() and time.monotonic() < deadline:
        assert start.code() is None
    start.kill()
    assert start.code() == -signal.SIGKILL
    with pytest.raises(TimeoutError):
        program.start([str(tmp_path / "w"), "600"], tmp_path / "out").wait(0.1)
    assert program.start([str(tmp_path / "w"), "0"], tmp_path / "out").wait(60) == 3


def test_a_process_makes_itself_die_too(source, tmp_path):
    code = f"""
        import pathlib, a_program
        from tests.faults import deaths

        deaths.die_at(a_program.__file__, {WRITES})
        a_program.work(pathlib.Path({str(tmp_path / "written")!r}))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    paths = f"{starts.ROOT}:{source.parent}"
    done = subprocess.run(command, env={"PYTHONPATH": paths}, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, b"")
    assert not (tmp_path / "written").exists()
