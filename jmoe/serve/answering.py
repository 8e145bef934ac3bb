"""From a request to what the engine is asked for, and from its tokens to the answer.

The two kinds of requests, completions and chats, are two `ApiForm`s: how prompts become
tokens, and what choices look like, whole and in the chunks of a stream.
"""

import dataclasses
import functools
import random
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from jmoe.data.tokenizer import Tokenizer
from jmoe.decode.text import TextStream
from jmoe.monitor.serving import ServingMeter
from jmoe.serve.answers import Refused
from jmoe.serve.chat import ChatTemplate
from jmoe.serve.openai import (
    COMPLETION_TOKENS,
    AskedChat,
    AskedCompletion,
    AskedTokens,
    read,
)
from jmoe.serve.openai_answers import (
    ChatChoice,
    ChatDelta,
    ChatMessage,
    Completions,
    TextChoice,
    Usage,
)
from jmoe.serve.token_logprobs import Logprobs
from jmoe.serve.worker import Increment, Request, Worker

CONTEXT = 32  # tokens of a prompt with which the first new ones are decoded


@dataclasses.dataclass(frozen=True)
class Served:
    """A model, and what one request may ask of it.

    max_length: tokens of a prompt and its completion. new_tokens: that a completion may
    have; None: what is left. deadline_seconds: that an answer may take.
    """

    name: str
    worker: Worker
    meter: ServingMeter
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_length: int
    new_tokens: int | None
    deadline_seconds: float
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


class Grown(NamedTuple):
    """What a choice has grown by: text that is certain now, and the tokens of it."""

    number: int
    text: str
    got: Increment
    finish_reason: str | None


class ApiForm(Protocol):
    """One kind of requests. It is told `asked` and `served` when it is made."""

    names: tuple[str, str, str]  # of ids; of an answer's and a chunk's object
    prompts: list[list[int]]

    def whole(self, grown: Grown, logprobs: Logprobs) -> Any: ...

    def openings(self, number: int) -> Iterable[Any]: ...

    def deltas(self, grown: Grown, logprobs: Logprobs) -> Iterable[Any]: ...


class TextForm:
    """Completions."""

    names = "cmpl", "text_completion", "text_completion"

    def __init__(self, served: Served, body: bytes):
        self.asked = read(AskedCompletion, body)
        decode = served.tokenizer.decode
        self.prompts, self._echoed = [], []
        for prompt in self.asked.prompt:
            is_text = isinstance(prompt, str)
            ids = served.tokenizer.prompt(prompt) if is_text else prompt
            self.prompts.append(ids)
            if self.asked.echo:
                self._echoed.append(prompt if is_text else decode(prompt))

    def whole(self, grown: Grown, logprobs: Logprobs) -> TextChoice:
        return self._choice(grown, logprobs, self._echo(grown.number) + grown.text)

    def openings(self, number: int) -> Iterable[TextChoice]:
        """Yields what a stream of this choice begins with."""
        if self.asked.echo:
            yield TextChoice(
                index=number,
                text=self._echo(number),
                logprobs=None,
                finish_reason=None,
            )

    def deltas(self, grown: Grown, logprobs: Logprobs) -> Iterable[TextChoice]:
        if grown.text or grown.finish_reason or _tells_tokens(self.asked):
            yield self._choice(grown, logprobs, grown.text)

    def _choice(self, grown: Grown, logprobs: Logprobs, text: str) -> TextChoice:
        is_told = self.asked.num_logprobs is not None
        choice = TextChoice(
            index=grown.number,
            text=text,
            logprobs=logprobs.of_text(grown.got) if is_told else None,
            finish_reason=grown.finish_reason,
        )
        if self.asked.return_token_ids:
            choice.token_ids = grown.got.tokens
            if not self.asked.stream:
                choice.prompt_token_ids = self.prompts[
                    grown.number // self.asked.choices
                ]
        return choice

    def _echo(self, number: int) -> str:
        return self._echoed[number // self.asked.choices] if self.asked.echo else ""


class ChatForm:
    """Messages of a conversation."""

    names = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, served: Served, body: bytes):
        self.asked = read(AskedChat, body)
        if served.template is None:
            raise Refused(
                400,
                f"{served.name!r} has no chat template: ask /v1/completions, or put a "
                "chat_template.jinja beside its tokenizer.json.",
                "messages",
            )
        messages = [message.for_template() for message in self.asked.messages]
        self.prompts = [served.template.encode(messages)]

    def whole(self, grown: Grown, logprobs: Logprobs) -> ChatChoice:
        is_told = self.asked.num_logprobs is not None
        choice = ChatChoice(
            index=grown.number,
            message=ChatMessage(role="assistant", content=grown.text),
            logprobs=logprobs.of_chat(grown.got) if is_told else None,
            finish_reason=grown.finish_reason,
        )
        if self.asked.return_token_ids:
            choice.token_ids = grown.got.tokens
        return choice

    def openings(self, number: int) -> Iterable[ChatDelta]:
        """Yields what a stream of this choice begins with."""
        opening = ChatMessage(role="assistant", content="")
        yield ChatDelta(index=number, delta=opening, logprobs=None, finish_reason=None)

    def deltas(self, grown: Grown, logprobs: Logprobs) -> Iterable[ChatDelta]:
        tokens = grown.got.tokens
        if grown.text or (tokens and _tells_tokens(self.asked)):
            is_told = self.asked.num_logprobs is not None
            delta = ChatDelta(
                index=grown.number,
                delta=ChatMessage(content=grown.text),
                logprobs=logprobs.of_chat(grown.got) if is_told else None,
                finish_reason=None,
            )
            if self.asked.return_token_ids:
                delta.token_ids = tokens
            yield delta
        if grown.finish_reason:
            yield ChatDelta(
                index=grown.number,
                delta=ChatMessage(),
                logprobs=None,
                finish_reason=grown.finish_reason,
            )


class Answering:
    """One request: what the engine is asked for, and the answer as it grows.

    Raises:
      Refused, ValueError: it asks for what can't be served.
    """

    def __init__(
        self, served: Served, form: type[TextForm] | type[ChatForm], body: bytes
    ):
        self.form = form(served, body)
        self.asked: AskedTokens = self.form.asked
        if self.asked.model != served.name:
            message = f"model={self.asked.model!r} isn't served here: {served.name!r}."
            raise Refused(404, message, "model")
        self._served = served
        self.requests: list[Request] = []
        self._streams: list[TextStream] = []
        self._logprobs: list[Logprobs] = []
        for prompt in self.form.prompts:
            self._add(prompt)
        self._new_tokens = 0
        kind, self._object, self._chunk = self.form.names
        self._id = f"{kind}-{random.getrandbits(96):024x}"
        self._created = int(time.time())

    @property
    def seconds(self) -> float:
        """How long it may take."""
        most = self._served.deadline_seconds
        return min(self.asked.deadline_seconds or most, most)

    def _add(self, prompt: list[int]) -> None:
        served, tokenizer = self._served, self._served.tokenizer
        longest = _longest(self.asked, served, len(prompt))
        first = self.asked.sampling(longest, tokenizer.stop_ids)
        context = prompt[len(tokenizer.opening) :][-CONTEXT:]
        for choice in range(self.asked.choices):
            self.requests.append((prompt, first.further(choice)))
            stream = TextStream(tokenizer.decode, context, first.stop_texts)
            self._streams.append(stream)
            self._logprobs.append(Logprobs(tokenizer.token_bytes))

    def whole(self, increments: Iterable[Increment]) -> Completions:
        """Returns the answer, of one increment of each of its requests."""
        by_number = sorted(increments, key=lambda increment: increment.number)
        choices = [
            self.form.whole(grown, self._logprobs[grown.number])
            for grown in map(self._grow, by_number)
        ]
        answer = self._answer(self._object, choices)
        answer.usage = self._usage()
        if self.asked.return_token_ids and isinstance(self.form, ChatForm):
            answer.prompt_token_ids = self.form.prompts[0]
        return answer

    def beginning(self) -> bytes:
        """Returns what a stream begins with."""
        numbers = range(len(self.requests))
        return self._events(x for number in numbers for x in self.form.openings(number))

    def chunk(self, increments: Sequence[Increment]) -> bytes:
        """Returns the events of these increments."""
        return self._events(
            delta
            for increment in _joined(increments)
            for delta in self.form.deltas(
                self._grow(increment), self._logprobs[increment.number]
            )
        )

    def ending(self) -> bytes:
        """Returns what a stream that came to its end ends with."""
        if not self.asked.tells_usage:
            return b""
        answer = self._answer(self._chunk, [])
        answer.usage = self._usage()
        return event(answer.to_json())

    def _grow(self, increment: Increment) -> Grown:
        stream = self._streams[increment.number]
        text = stream.add(increment.tokens)
        if increment.finish_reason:
            text += stream.end()
        self._new_tokens += len(increment.tokens)
        return Grown(increment.number, text, increment, increment.finish_reason)

    def _events(self, choices: Iterable[Any]) -> bytes:
        before, after = self._around_choice
        return b"".join(event(before + choice.to_json() + after) for choice in choices)

    @functools.cached_property
    def _around_choice(self) -> tuple[bytes, bytes]:
        """What is before and behind the one choice of each of its chunks."""
        answer = self._answer(self._chunk, [])
        if self.asked.tells_usage:
            answer.usage = None
        before, opening, after = answer.to_json().partition(b'"choices":[')
        return before + opening, after

    def _answer(self, kind: str, choices: list[Any]) -> Completions:
        return Completions(
            id=self._id,
            object=kind,
            created=self._created,
            model=self._served.name,
            choices=choices,
        )

    def _usage(self) -> Usage:
        prompt_tokens = sum(map(len, self.form.prompts))
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._new_tokens,
            total_tokens=prompt_tokens + self._new_tokens,
        )


def event(data: bytes) -> bytes:
    """Returns one event of a stream."""
    return b"data: " + data + b"\n\n"


def _longest(asked: AskedTokens, served: Served, prompt_tokens: int) -> int:
    """Returns how many tokens a completion may have."""
    room = served.max_length - prompt_tokens
    if room < 1:
        raise Refused(
            400,
            f"The prompt has {prompt_tokens} tokens; with a new one there may be "
            f"{served.max_length}.",
            "messages" if isinstance(asked, AskedChat) else "prompt",
        )
    most = min(room, served.new_tokens or room)
    if asked.longest is None:
        is_chat = isinstance(asked, AskedChat)
        return most if is_chat else min(most, COMPLETION_TOKENS)
    if asked.longest > most:
        raise Refused(
            400,
            f"max_tokens={asked.longest} must be at most {most}: the prompt has "
            f"{prompt_tokens} tokens.",
            "max_tokens",
        )
    return asked.longest


def _joined(increments: Sequence[Increment]) -> Iterable[Increment]:
    """Returns the increments, those of each request as one."""
    found: dict[int, Increment] = {}
    for increment in increments:
        if increment.number in found:
            before = found[increment.number]
            increment = Increment(
                increment.number,
                before.tokens + increment.tokens,
                before.logprobs + increment.logprobs,
                before.top_logprobs + increment.top_logprobs,
                increment.finish_reason,
            )
        found[increment.number] = increment
    return found.values()


def _tells_tokens(asked: AskedTokens) -> bool:
    """Returns whether a chunk without text says something all the same."""
    return asked.num_logprobs is not None or bool(asked.return_token_ids)
