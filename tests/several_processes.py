"""Starts a program as several processes on this machine, and ends them all in time."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Ended(NamedTuple):
    code: int
    out: str  # less what Gloo prints of its connections
    err: str


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(
    arguments: Sequence[str | os.PathLike], *, devices: int = 2, **environment: str
) -> subprocess.Popen:
    """Python with these arguments, and so many virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(running: Sequence[subprocess.Popen], timeout_s: float = 60) -> list[Ended]:
    """Waits for all; a hang is an error that shows what they said."""
    deadline = time.monotonic() + timeout_s
    results, late = [], False
    for process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
        out, err = process.communicate()
        ours = [x for x in out.splitlines(keepends=True) if not x.startswith("[Gloo]")]
        results.append(Ended(process.wait(), "".join(ours), err))
    assert not late, f"not done within {timeout_s} s: {results}"
    return results
