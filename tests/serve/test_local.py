"""Our engine served by the script, and what a server does when it is told to stop."""

import asyncio
import functools
import http.client
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from jmoe.config.serve import LimitsConfig, ServeConfig
from jmoe.export import hf
from jmoe.monitor import binding
from jmoe.serve import local
from jmoe.serve.api import make_app
from jmoe.serve.front import Access
from tests.serve.client import events
from tests.serve.counting import Counting
from tests.serve.own import (
    NAME,
    PATIENCE,
    RESTLESS,
    make_served,
    tokenizer,
    variables,
)
from tests.serve.running import wait_until
from tests.smallest_run import get_config

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "serve.py"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def post(port: int, body) -> urllib.request.Request:
    url = f"http://127.0.0.1:{port}/v1/completions"
    return urllib.request.Request(url, json.dumps({"model": NAME} | body).encode())


def serve(engine: Counting, seconds: float, meanwhile: Callable) -> None:
    """Serves; `meanwhile`, in a thread, is called with the port and what stops it."""
    cfg = ServeConfig(name=NAME, port=free_port(), drain_seconds=seconds)
    served = make_served(engine, max_length=10**6)

    async def main() -> None:
        stop, loop = local.Stop(), asyncio.get_running_loop()
        stop_it = functools.partial(loop.call_soon_threadsafe, stop)
        asking = asyncio.create_task(asyncio.to_thread(meanwhile, cfg.port, stop_it))
        with binding.bind(cfg.host, cfg.port) as bound:
            app, access = make_app(served), Access(LimitsConfig())
            await local.serve_until_stopped(app, cfg, access, bound, stop)
        await asking

    asyncio.run(main())
    served.worker.close()


def opened(request: urllib.request.Request) -> Any:
    """The response, once the server listens."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return urllib.request.urlopen(request, timeout=PATIENCE)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_is_in_flight_is_answered_and_the_rest_refused(capsys):
    engine = Counting(pause=0.01)
    found: list = []

    def meanwhile(port, stop):
        with opened(post(port, {"prompt": "a", "max_tokens": 90, "stream": True})) as r:
            stop()
            with pytest.raises(urllib.error.HTTPError) as refused:
                while True:
                    opened(post(port, {"prompt": "a", "max_tokens": 1}))
            found.append(refused.value.code)
            refused.value.close()
            found.append(events(r))

    serve(engine, PATIENCE, meanwhile)
    status, (*_, last, done) = found
    assert status == 503 and done == "[DONE]"
    assert last["choices"][0]["finish_reason"] == "length"
    said = capsys.readouterr().out
    assert "Serving tiny at http://127.0.0.1:" in said and "Stopped." in said


@pytest.mark.parametrize(("stops", "seconds"), [(1, 0.2), (2, PATIENCE)])
def test_what_takes_too_long_is_cut_off_and_a_second_stop_does_not_wait(
    capsys, stops, seconds
):
    engine = Counting(pause=0.01)
    endless = {"prompt": "a", "max_tokens": 10**5, "stream": True}

    def meanwhile(port, stop):
        with opened(post(port, endless)) as response:
            for _ in range(stops):
                stop()
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                response.read()

    serve(engine, seconds, meanwhile)
    assert "Cut off 1 requests" in capsys.readouterr().out
    wait_until(lambda: not engine.asked)


def test_the_script_serves_an_exported_model_until_sigterm(tmp_path):
    directory = tmp_path / NAME
    hf.save(directory, get_config().model, variables())
    for name, content in tokenizer().files.items():
        (directory / name).write_bytes(content)
    port = free_port()
    command = [
        *(sys.executable, str(SCRIPT), f"--model={directory}", "--engine=jax"),
        *("--local", f"--set=port={port}", "--set=engine.max_sequences=1"),
        f"--set={RESTLESS}",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert server.stdout is not None
        said_first: list[bytes] = []
        while not said_first or said_first[-1].startswith((b"Compiling", b"  ")):
            said_first.append(server.stdout.readline())
        assert said_first[0] == b"Compiling 4 sizes of steps.\n"
        assert re.fullmatch(rb"  1 decoded: [\d.]+ s\n", said_first[1])
        assert re.fullmatch(rb"  1 decoded, 1 x 32 tokens read: .* s\n", said_first[2])
        assert len(said_first) == 6 and said_first[5].startswith(b"Serving tiny at ")
        body = {"prompt": [7, 3], "max_tokens": 4, "temperature": 0, "n": 8}
        with opened(post(port, body | {"return_token_ids": True})) as response:
            answer = json.loads(response.read())
        assert len(answer["choices"][0]["token_ids"]) == 4
    finally:
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=PATIENCE)
    assert server.returncode == 0, said
    assert b"admit: requests wait for up to" in said
