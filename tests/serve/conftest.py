"""A small run that was trained and exported by the scripts, and servers of it."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from jmoe.train.trained import Trained, load_trained
from tests.serve.client import NAME, PATIENCE, Server

ROOT = pathlib.Path(__file__).parents[2]
# A head size that vLLM has on CPUs, and room for answers that take seconds.
SETTINGS = (
    "model.attention.nope_dim=24",
    "model.max_positions=1024",
    "train.steps=150",
)


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("serving")
    documents = (f"The square of {i} is {i * i}. " * 3 for i in range(80))
    text = directory / "squares.txt"
    text.write_text("<|endoftext|>".join(documents))
    settings = (
        *SETTINGS,
        f"data.sources=[{{'path': '{text}'}}]",
        f"data.cache_dir={directory / 'cache'}",
    )
    run_script(
        "train",
        f"--experiment={ROOT / 'tests' / 'smallest_run.py'}",
        f"--workdir={directory / 'run'}",
        *(f"--set={setting}" for setting in settings),
    )
    return directory / "run"


@pytest.fixture(scope="session")
def trained(workdir) -> Trained:
    return load_trained(workdir)


@pytest.fixture(scope="session")
def directory(workdir) -> pathlib.Path:
    """What is served."""
    out = workdir.parent / NAME
    run_script("export_hf", f"--workdir={workdir}", f"--out={out}")
    return out


@pytest.fixture(scope="session")
def start(directory, tmp_path_factory):
    """Starts a server with these arguments; leaving the context ends it."""

    @contextlib.contextmanager
    def started(*arguments: str) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("server") / "log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = [sys.executable, ROOT / "scripts" / "serve.py"]
        settings = [f"--set=port={port}", "--set=engine.cache_gib=0.25"]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*script, f"--model={directory}", *settings, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"RAY_ADDRESS": "local"},
            )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        try:
            server.wait_for(lambda: "\nServing" in "\n" + log.read_text())
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)

    return started


def run_script(name: str, *arguments: str) -> None:
    command = [sys.executable, ROOT / "scripts" / f"{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
