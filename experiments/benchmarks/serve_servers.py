"""Servers of one exported model, each started as its users start it."""

import contextlib
import importlib.util
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from experiments.benchmarks import decode_vllm, hostile, serve_vllm
from experiments.benchmarks.hostile_requests import Target
from experiments.benchmarks.report import ROOT
from experiments.benchmarks.serve_model import MAX_LENGTH

MAX_SEQUENCES = 32
_PATIENCE_S = 600.0
_PAGE_S = 30.0
_SETTLE_S = 20.0
_THERE = ("jmoe_requests_running", "jmoe_requests_waiting")
# Those whose memory requests might fill; others come and go.
_WATCHED = re.compile(r"serve\.py|serve_vllm|ray::(Serve|Proxy)|EngineCore")


class Server(NamedTuple):
    """A server that runs; pids: of its processes."""

    url: str
    target: Target
    pids: list[int]


class Command(NamedTuple):
    """How a server is started: arguments of Python, and variables."""

    arguments: list[str]
    environment: Mapping[str, str] = {}


def ours(directory: pathlib.Path, port: int, *settings: str) -> Command:
    """Returns our engine, on this machine alone."""
    return Command([*_script(directory, port, "jax", *settings), "--local"])


def ours_on_ray(directory: pathlib.Path, port: int, *settings: str) -> Command:
    return Command(_script(directory, port, "jax", *settings), _RAY)


def vllm(directory: pathlib.Path, port: int, *settings: str) -> Command:
    """Returns vLLM's own server, compiled, with all cores and a fast OpenMP."""
    program = ("-m", serve_vllm.__name__, str(directory), str(port))
    return Command([*program, *COMMON, *settings], _fast_openmp())


def vllm_on_ray(directory: pathlib.Path, port: int, *settings: str) -> Command:
    """Returns the same engine as we serve it."""
    compiled = ("engine.compiled=True", *settings)
    return Command(_script(directory, port, "vllm", *compiled), _RAY | _fast_openmp())


_RAY = {"RAY_ADDRESS": "local"}
COMMON = (f"engine.max_sequences={MAX_SEQUENCES}", f"engine.max_length={MAX_LENGTH}")
SIDES: dict[str, Callable[..., Command]] = {
    side.__name__: side for side in (ours, ours_on_ray, vllm, vllm_on_ray)
}


def needed(side: str) -> list[str]:
    """Returns what a side needs and isn't installed."""
    packages = {"ours": (), "ours_on_ray": ("ray",), "vllm": ("vllm",)}
    asked = packages.get(side, ("ray", "vllm"))
    return [name for name in asked if not importlib.util.find_spec(name)]


@contextlib.contextmanager
def running(
    make: Callable[..., Command], directory: pathlib.Path, *settings: str
) -> Iterator[Server]:
    """Starts a server on a free port; stops it at the end.

    Args:
      make: returns how, from a directory, a port and settings.

    Raises:
      RuntimeError: it doesn't start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = make(directory, port, *settings)
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, *command.arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **command.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, pathlib.Path(log.name))
            target = hostile.find_target(url, None)
            yield Server(url, target, watched(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_PATIENCE_S)


def unfinished(server: Server) -> float:
    """Returns how many requests it still has once its clients are gone.

    It has a while to notice that they are.
    """
    deadline = time.monotonic() + _SETTLE_S
    while (count := _requests(server)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return count


def _requests(server: Server) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=_PAGE_S) as page:
        lines = page.read().decode().splitlines()
    gauges = [line.split() for line in lines if line.startswith(_THERE)]
    assert len(gauges) >= len(_THERE), "it tells of both"
    return sum(float(value) for *_, value in gauges)


def watched(root: int) -> list[int]:
    """Returns the process `root`, and those below it whose memory may fill."""
    parents, names = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            pid = int(path.name)
            names[pid] = (path / "cmdline").read_text(errors="replace")
            state = (path / "stat").read_text().rpartition(")")[2].split()
            parents[pid] = int(state[1])
    below = [root]
    for pid in below:
        below += [child for child, parent in parents.items() if parent == pid]
    return [pid for pid in below if pid == root or _WATCHED.search(names[pid])]


def _script(
    directory: pathlib.Path, port: int, engine: str, *settings: str
) -> list[str]:
    return [
        str(ROOT / "scripts" / "serve.py"),
        f"--model={directory}",
        f"--engine={engine}",
        *(f"--set={setting}" for setting in (f"port={port}", *COMMON, *settings)),
    ]


def _fast_openmp() -> dict[str, str]:
    preload = decode_vllm.environment().get("LD_PRELOAD")
    return {"LD_PRELOAD": preload} if preload else {}


def _wait(process: subprocess.Popen, url: str, log: pathlib.Path) -> None:
    """Waits until it is well."""
    deadline = time.monotonic() + _PATIENCE_S
    while not is_well(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"The server didn't start: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def is_well(url: str) -> bool:
    """Returns whether a server's health is good; false where there is none."""
    with contextlib.suppress(OSError):
        with urllib.request.urlopen(f"{url}/health", timeout=_PAGE_S) as page:
            return page.status == 200
    return False
