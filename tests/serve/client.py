"""A server of the small run in a process of its own, as its clients use it."""

import concurrent.futures
import json
import pathlib
import re
import signal
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

NAME = "squares"  # of the model
PROMPTS = ([0], [0, 5, 9, 70], [0, 34, 132, 62, 255], [0, 12, 13, 14, 15, 16, 17])
PATIENCE = 480  # seconds; a server may share its cores with another one


class Response(NamedTuple):
    status: int
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Server(NamedTuple):
    process: subprocess.Popen
    url: str
    log: pathlib.Path
    key: str | None = None

    def open(self, path: str, body: Any = None) -> Any:
        """The response as it comes; `body` is sent as JSON unless it is bytes."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, data, headers)
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        return urllib.request.urlopen(request, timeout=PATIENCE, context=trusting)

    def ask(self, path: str, body: Any = None) -> Response:
        try:
            with self.open(path, body) as response:
                return Response(response.status, response.read().decode())
        except urllib.error.HTTPError as error:
            return Response(error.code, error.read().decode())

    def complete(self, prompt: Any, max_tokens: int) -> list[int]:
        """The most likely tokens."""
        response = self.ask("/v1/completions", greedy(prompt, max_tokens))
        assert response.status == 200, response
        return response.json["choices"][0]["token_ids"]

    def measured(self, name: str) -> dict[str, float]:
        """A metric, by replica."""
        page = self.ask("/metrics").text
        found = re.findall(rf'^{name}{{.*replica="(\w+)".*}} (\S+)$', page, re.M)
        return {replica: float(value) for replica, value in found}

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds; fails when the server ends before, or it takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            alive = self.process.poll() is None and time.monotonic() < deadline
            assert alive, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def ask_until(
        self, condition: Callable[[], bool], prompt: Any, max_tokens: int
    ) -> None:
        """Has four clients ask on and on until it holds; all of them are answered."""
        enough = threading.Event()

        def ask_on():
            while not enough.is_set():
                self.complete(prompt, max_tokens)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            askers = [pool.submit(ask_on) for _ in range(4)]
            try:
                self.wait_for(condition)
            finally:
                enough.set()
            for asker in askers:
                asker.result()

    def drain_and_check(self, prompt: Any, max_tokens: int) -> None:
        """Ends it by SIGTERM: what is in flight is finished, and the rest refused."""
        alone = self.complete(prompt, max_tokens)
        body = greedy(prompt, max_tokens, stream=True)
        streams = [self.open("/v1/completions", body) for _ in range(4)]
        self.process.send_signal(signal.SIGTERM)
        self.wait_for(lambda: self.ask("/health").status == 503)
        refused = self.ask("/v1/completions", greedy(PROMPTS[0], 1))
        assert refused.status == 503 and "shutting down" in refused.text
        for stream in streams:
            *pieces, done = events(stream)
            tokens = [t for piece in pieces for t in piece["choices"][0]["token_ids"]]
            assert (done, tokens) == ("[DONE]", alone)
        assert self.process.wait(60) == 0


def greedy(prompt: Any, max_tokens: int, **options: Any) -> dict[str, Any]:
    """A request for exactly so many of the most likely tokens."""
    exactly = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return (
        {"model": NAME, "prompt": prompt, "return_token_ids": True} | exactly | options
    )


def events(response: Any) -> list[Any]:
    """What a stream sent, each event parsed; its end is "[DONE]"."""
    lines = [line.decode().strip() for line in response]
    sent = [line.removeprefix("data: ") for line in lines if line]
    return [text if text == "[DONE]" else json.loads(text) for text in sent]
