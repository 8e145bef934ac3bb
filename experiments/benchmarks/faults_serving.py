"""A server of the tiny model, started by the scripts, for clients that misbehave."""

import contextlib
import importlib.util
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from experiments.benchmarks import faults_runs
from experiments.benchmarks.report import ROOT, Figure
from experiments.benchmarks.serve_servers import watched

NEEDED = ("ray", "vllm")
# A head size that vLLM has on CPUs, and room for answers that take a while.
_SETTINGS = ("model.attention.nope_dim=24", "model.max_positions=1024")
# Slow clients are let go of early, so that 300 requests take minutes.
LIMITS = (
    "engine.cache_gib=0.25",
    "limits.header_seconds=2",
    "limits.body_seconds=3",
)
_PATIENCE_S = 300
_FLAT_MIB = 64


class Server(NamedTuple):
    url: str
    key: str
    pids: list[int]


def missing() -> list[str]:
    """What serving needs and isn't installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def served(directory: pathlib.Path) -> Iterator[Server]:
    """Trains, exports and serves a model below `directory`; stops the server at last.

    Raises:
      RuntimeError: a script failed, or the server doesn't start.
    """
    settings = (*faults_runs.settings(directory.parent / "data"), *_SETTINGS)
    workdir, exported = directory / "run", directory / "served"
    _script(
        "train",
        "--experiment=tests/smallest_run.py",
        f"--workdir={workdir}",
        *(f"--set={setting}" for setting in settings),
    )
    _script("export_hf", f"--workdir={workdir}", f"--out={exported}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key, log = secrets.token_hex(16), directory / "server.log"
    options = [f"--set={setting}" for setting in (f"port={port}", *LIMITS)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                ROOT / "scripts" / "serve.py",
                f"--model={exported}",
                *options,
            ],
            env=_environment({"RAY_ADDRESS": "local", "JMOE_API_KEYS": key}),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait(process, log)
        yield Server(f"http://127.0.0.1:{port}", key, watched(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_PATIENCE_S)


def figures(result: Mapping[str, float], requests: int) -> Iterator[Figure]:
    """Yields the figures of what `hostile.measure` returns."""
    yield Figure(
        name="hostile requests",
        value=result["hostile"],
        unit="",
        definition="at a served tiny model, many at once, of every kind in "
        "experiments/benchmarks/hostile_requests.py",
        at_least=requests,
    )
    yield Figure(
        name="hostile, neither refused nor closed",
        value=result["failed"],
        unit="",
        definition="let through, answered by a 5xx, or open for ever",
        at_most=0,
    )
    yield Figure(
        name="normal requests served meanwhile",
        value=result["served"] / result["normal"],
        unit="share",
        definition=f"of {result['normal']:.0f}, answered as before; the slowest took "
        f"{result['normal_slowest_seconds']:.1f} s",
        at_least=1,
    )
    yield Figure(
        name="server processes alive afterwards",
        value=result["alive"],
        unit="share",
        definition="of the program and, where there are any, Ray Serve's controller, "
        "proxy and replica, and vLLM's engine",
        at_least=1,
    )
    yield Figure(
        name="server's memory grew by",
        value=result["rss_growth_mib"],
        unit="MiB",
        definition="resident memory of these processes together",
        at_most=_FLAT_MIB,
    )


def _script(name: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", *arguments],
        cwd=ROOT,
        env=_environment({}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"scripts/{name}.py failed: {done.stderr[-2000:]}")


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}


def _wait(process: subprocess.Popen, log: pathlib.Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while "\nServing" not in "\n" + log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"The server didn't start: {log.read_text()[-2000:]}")
        time.sleep(0.2)
