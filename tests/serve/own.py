"""Our engine served to tests, with the tiny model and the sizes of its own tests."""

import contextlib
import dataclasses
import functools
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

from jmoe.data.tokenizer import Tokenizer, train_bpe
from jmoe.decode.engine import Engine
from jmoe.monitor.serving import ServingMeter
from jmoe.serve.answering import Served
from jmoe.serve.api import make_app
from jmoe.serve.chat import ChatTemplate
from jmoe.serve.worker import Worker
from tests.decode.conftest import random_variables
from tests.decode.test_step import LIMITS
from tests.serve.client import Response, events
from tests.serve.running import address, running
from tests.smallest_run import get_config

NAME = "tiny"
QUEUE = 8  # requests that may be there
PATIENCE = 120  # seconds
RESTLESS = (  # whoever waits at all waits for too long
    "engine.controller={'actions': ('admit',), 'wait_seconds': 1e-6, "
    "'window_steps': 2, 'cool_down': 1}"
)
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':' + message.content + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
)


@functools.cache
def tokenizer() -> Tokenizer:
    """A token a byte, and one that ends texts."""
    files = {"tokenizer_config.json": b'{"eos_token": "<|endoftext|>"}'}
    trained = train_bpe([], vocab_size=257)
    files["tokenizer.json"] = trained.to_str().encode()
    return Tokenizer(trained, eos_id=0, files=files)


@functools.cache
def variables() -> Any:
    return random_variables(get_config().model)


def make_engine() -> Engine:
    limits = dataclasses.replace(LIMITS, queue=QUEUE)
    model = get_config().model
    return Engine(model, variables(), limits, text=tokenizer().decode)


def make_served(engine: Any, **changes: Any) -> Served:
    meter = ServingMeter(NAME, 1, 8)
    served = Served(
        name=NAME,
        worker=Worker(engine, meter),
        meter=meter,
        tokenizer=tokenizer(),
        template=ChatTemplate(TEMPLATE, tokenizer()),
        max_length=LIMITS.max_length,
        new_tokens=None,
        deadline_seconds=PATIENCE,
    )
    return dataclasses.replace(served, **changes)


class Client(NamedTuple):
    url: str
    served: Served

    def open(self, path: str, body: Any = None) -> Any:
        """The response as it comes; `body` is sent as JSON unless it is bytes."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data)
        return urllib.request.urlopen(request, timeout=PATIENCE)

    def ask(self, path: str, body: Any = None) -> Response:
        try:
            with self.open(path, body) as response:
                return Response(response.status, response.read().decode())
        except urllib.error.HTTPError as error:
            return Response(error.code, error.read().decode())

    def complete(self, prompt: Any, **fields: Any) -> Any:
        """The answer, of the most likely tokens unless fields say otherwise."""
        asked = {"model": NAME, "prompt": prompt, "temperature": 0} | fields
        response = self.ask("/v1/completions", asked)
        assert response.status == 200, response
        return response.json

    def chat(self, content: str, **fields: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        asked = {"model": NAME, "messages": messages, "temperature": 0} | fields
        response = self.ask("/v1/chat/completions", asked)
        assert response.status == 200, response
        return response.json

    def stream(self, path: str, **fields: Any) -> list[Any]:
        """What a stream sent before its end."""
        asked = {"model": NAME, "temperature": 0, "stream": True} | fields
        with self.open(path, asked) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            *sent, done = events(response)
        assert done == "[DONE]"
        return sent


@contextlib.contextmanager
def serving(served: Served) -> Iterator[Client]:
    with running(make_app(served), lifespan="off") as server:
        host, port = address(server)
        try:
            yield Client(f"http://{host}:{port}", served)
        finally:
            served.worker.close()
