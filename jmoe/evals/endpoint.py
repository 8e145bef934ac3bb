"""Completions by a server with OpenAI's API, such as vLLM's or scripts/serve.py.

What a moment may cure (no connection, 408, 409, 429, 5xx) is tried again, ever later;
the evaluation ends when it isn't cured by the last try. What a server says of one
request (400, 413, 422: too long a prompt, say) is that request's error, and the others
go on.
"""

import collections
import dataclasses
import http.client
import json
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jmoe.config import checks
from jmoe.evals.completions import Prompted, Reply

KEY_VARIABLE = "OPENAI_API_KEY"  # of the environment; a command line is public
APIS = ("chat", "completions")
MAY_PASS = (408, 409, 429)  # and all from 500
OF_THE_REQUEST = (400, 413, 422)
MAX_WAIT = 60.0  # seconds
_SHOWN = 200  # characters of an answer in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Says where a server is and how it is asked.

    endpoint: the API's root, as OpenAI's clients take it: http://host:8000/v1. model:
    "", if the server has only one. seconds: that one answer may take; wait: before the
    second try, and twice as long before each next one.
    """

    endpoint: str
    model: str = ""
    api: str = "chat"
    concurrency: int = 16
    tries: int = 6
    wait: float = 1.0
    seconds: float = 1800.0

    def __post_init__(self):
        checks.one_of(self, api=APIS)
        checks.at_least(self, concurrency=1, tries=1, wait=0.0)
        checks.above_zero(self, "seconds")
        if not _is_url(self.endpoint):
            raise ValueError(
                f"endpoint={self.endpoint!r} must be a URL such as "
                "http://localhost:8000/v1."
            )


class _Api(NamedTuple):
    """Says where requests go, what they hold, and where an answer has its text."""

    path: str
    prompt: Any
    text: Any


_APIS = {
    "chat": _Api(
        "/chat/completions",
        lambda text: {"messages": [{"role": "user", "content": text}]},
        lambda choice: choice["message"]["content"],
    ),
    "completions": _Api(
        "/completions", lambda text: {"prompt": text}, lambda choice: choice["text"]
    ),
}


class Endpoint:
    """A server that was found; `complete` asks it.

    Raises:
      ConnectionError: it can't be reached.
      ValueError: it has no such model, or several and `cfg.model` names none.
    """

    def __init__(self, cfg: EndpointConfig, key: str | None = None):
        self._cfg, self._key = cfg, key
        self._url = cfg.endpoint.rstrip("/")
        # To another host, the key would go along.
        self._opener = urllib.request.build_opener(_NoRedirects())
        self.model = self._choose()

    def complete(self, prompts: Sequence[Prompted]) -> Iterator[Reply]:
        """Yields replies as they come; see `completions.Complete`.

        Raises:
          ConnectionError: the server is gone for longer than the last try.
          ValueError: it refuses everything, or what it answers is no completion.
        """
        waiting = collections.deque(enumerate(prompts))
        found: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()
        # Daemons, as no one waits for answers to an evaluation that has ended.
        for _ in range(min(self._cfg.concurrency, len(prompts))):
            arguments = (waiting, found)
            threading.Thread(target=self._work, args=arguments, daemon=True).start()
        try:
            for _ in prompts:
                reply = found.get()
                if isinstance(reply, Exception):
                    raise reply
                yield reply
        finally:
            waiting.clear()

    def _work(
        self,
        waiting: collections.deque[tuple[int, Prompted]],
        found: queue.SimpleQueue[Reply | Exception],
    ) -> None:
        """Asks what waits, until nothing does or it fails."""
        while True:
            try:
                number, prompt = waiting.popleft()
            except IndexError:
                return
            try:
                found.put(self._ask(number, prompt))
            except Exception as error:  # raised again where replies are yielded
                found.put(error)
                return

    def _ask(self, number: int, prompt: Prompted) -> Reply:
        api, sampling = _APIS[self._cfg.api], prompt.sampling
        body = {
            "model": self.model,
            **api.prompt(prompt.text),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        if sampling.stop_texts:
            body["stop"] = list(sampling.stop_texts)
        try:
            answer = self._persist(api.path, body)
        except _RequestRefused as refused:
            return Reply(number, "", "error", str(refused))
        try:
            (choice,) = answer["choices"]
            text = api.text(choice)
            if not isinstance(text, str | None):  # None: a chat that said nothing
                raise TypeError(f"{type(text).__name__} instead of text")
            reason = str(choice.get("finish_reason") or "stop")
            return Reply(number, text or "", reason)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            shown = json.dumps(answer)[:_SHOWN]
            raise ValueError(
                f"endpoint={self._url!r} answered with no completion: {shown}."
            ) from error

    def _choose(self) -> str:
        if self._cfg.model:
            return self._cfg.model
        answer = self._persist("/models", None)
        try:
            names = [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError) as error:
            shown = json.dumps(answer)[:_SHOWN]
            raise ValueError(
                f"endpoint={self._url!r} answered with no list of models: {shown}."
            ) from error
        if len(names) != 1:
            raise ValueError(
                f"endpoint={self._url!r} has the models {', '.join(names) or 'none'}; "
                "name one by --endpoint_model."
            )
        return names[0]

    def _persist(self, path: str, body: Any) -> Any:
        """Returns the JSON that the server answers with, at the last try or before."""
        wait = self._cfg.wait
        for last in [False] * (self._cfg.tries - 1) + [True]:
            try:
                return self._send(path, body)
            except _Passing as passing:
                if last:
                    raise ConnectionError(
                        f"endpoint={self._url!r}: {passing}, at the last of "
                        f"{self._cfg.tries} tries."
                    ) from passing
                pause = passing.seconds or wait * random.uniform(0.5, 1.0)
            time.sleep(min(pause, MAX_WAIT))
            wait *= 2
        raise AssertionError("the last try returns or raises")

    def _send(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self._cfg.seconds) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _Passing(f"{reason or type(error).__name__}") from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise ValueError(
                f"endpoint={self._url!r} answered with no JSON: {content[:_SHOWN]!r}."
            ) from error

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Returns what is raised for an answer that isn't 200."""
        said = f"status {error.code}: {_said(error)}"
        if error.code in MAY_PASS or error.code >= 500:
            return _Passing(said, _seconds(error.headers.get("Retry-After")))
        if error.code in OF_THE_REQUEST:
            return _RequestRefused(said)
        hint = f" (its key is of ${KEY_VARIABLE})" if error.code in (401, 403) else ""
        return ValueError(f"endpoint={self._url!r} answered with {said}{hint}.")


class _Passing(Exception):
    """A failure that may pass. seconds: what the server asks to wait, or 0."""

    def __init__(self, said: str, seconds: float = 0.0):
        super().__init__(said)
        self.seconds = seconds


class _RequestRefused(Exception):
    """One request that the server won't answer."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _is_url(text: str) -> bool:
    """Returns whether this is the URL of a host and a port that there may be."""
    try:
        parts = urllib.parse.urlsplit(text)
        is_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    is_plain = text.isascii() and text.isprintable() and " " not in text
    is_whole = not (parts.query or parts.fragment or parts.username)
    is_http = parts.scheme in ("http", "https") and bool(parts.hostname)
    return is_port and is_plain and is_whole and is_http


def _said(error: urllib.error.HTTPError) -> str:
    """Returns the message in an error's body, as far as there is one."""
    try:
        content = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        record = json.loads(content)
        record = record.get("error", record)
        text = record if isinstance(record, str) else record["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        text = content
    return " ".join(str(text).split())[:_SHOWN] or error.reason


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:  # a date
        return 0.0
