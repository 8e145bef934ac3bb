"""A lock that one process has at a time, and that no dead process keeps."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from jmoe.checkpoint import lock

HOLD = """
import pathlib, sys, time
from jmoe.checkpoint import lock

with lock.hold(pathlib.Path(sys.argv[1]), "out"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_held_lock_is_refused_with_host_and_process(tmp_path):
    path = tmp_path / "new" / lock.FILE
    holder = f"out is being .* by process {os.getpid()} on host {socket.gethostname()}"
    with lock.hold(path, "out"):
        with pytest.raises(ValueError, match=holder):
            with lock.hold(path, "out"):
                pass
        with pytest.raises(ValueError, match=holder):
            lock.require_free(path, "out")
    assert not path.exists()


def test_a_killed_process_leaves_no_lock(tmp_path):
    path = tmp_path / lock.FILE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on"):
            lock.require_free(path, "out")
        process.send_signal(signal.SIGKILL)
    assert path.exists()
    lock.require_free(path, "out")
    assert not path.exists()


def test_a_lock_that_was_removed_while_it_was_opened_is_not_taken_for_the_lock(
    tmp_path, monkeypatch
):
    """Who opened the file before its holder removed it would lock what nobody sees."""
    path, flock = tmp_path / lock.FILE, lock.fcntl.flock
    removed = []

    def removed_meanwhile(file, how):
        if not removed:
            removed.append(path.unlink())
        flock(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", removed_meanwhile)
    with lock.hold(path, "out"):
        assert path.exists()


def test_without_locks_in_the_file_system_it_warns_and_goes_on(
    tmp_path, monkeypatch, caplog
):
    def unsupported(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with lock.hold(tmp_path / lock.FILE, "out"):
        assert "let no other process write to out" in caplog.text
