"""Requests as OpenAI's API has them, checked, and what they ask of our engine.

A field that OpenAI has and this server doesn't serve may be there with a value that
changes nothing. With another one it is refused by name, as is a field that nobody
knows: nothing that a client asks for is passed over.

Beyond OpenAI's there are what vLLM's users know: `top_k`, `min_p`,
`repetition_penalty`, `stop_token_ids`, `ignore_eos` and `return_token_ids`; and
`deadline_seconds`, that the whole answer may take.
"""

import json
import random
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from jmoe.config import checks
from jmoe.decode.requests import Sampling
from jmoe.serve.answers import Refused

STOPS, STOP_CHARACTERS = 16, 1024  # each is looked for in each token's text
COMPLETION_TOKENS = 16  # of a completion that doesn't say, as OpenAI has it

# Fields that aren't served, with the values that change nothing, besides null.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # of no tools
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_UNSERVED_OF_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


def _check_unicode(text: str) -> str:
    if not checks.is_unicode(text):
        raise ValueError("must be Unicode, without halves of surrogate pairs")
    return text


Text = Annotated[str, pydantic.AfterValidator(_check_unicode)]
Stop = Annotated[Text, Field(min_length=1, max_length=STOP_CHARACTERS)]
Prompt = str | list[int]
A = TypeVar("A", bound="AskedTokens")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # bytes that hide lengths


class AskedTokens(_Strict):
    """What both kinds of requests may have."""

    model: Text
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)  # -1 and 0: of all
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=0, le=checks.MAX_SEED)
    stop: list[Stop] | None = Field(None, max_length=STOPS)
    stop_token_ids: list[int] | None = Field(None, max_length=STOPS)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    deadline_seconds: float | None = Field(None, gt=0)
    # Who asks, and what is asked again, for OpenAI's own records and caches.
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @pydantic.field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @pydantic.model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def num_logprobs(self) -> int | None:
        """How many likely tokens to tell of each; None: not even its own."""
        raise NotImplementedError

    @property
    def longest(self) -> int | None:
        """How many tokens a completion may have, if the request says."""
        return self.max_tokens

    def sampling(self, max_new_tokens: int, stop_ids: tuple[int, ...]) -> Sampling:
        """Returns how the first choice is drawn; each next one has the next seed.

        Args:
          stop_ids: the model's own.
        """
        own_stop_ids = () if self.ignore_eos else stop_ids
        seed = random.getrandbits(32) if self.seed is None else self.seed
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=seed,
            stop_ids=(*own_stop_ids, *(self.stop_token_ids or ())),
            stop_texts=tuple(self.stop or ()),
            logprobs=self.num_logprobs or 0,
        )


class AskedCompletion(AskedTokens):
    """A request for completions of texts, or of tokens."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)

    @pydantic.field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> list[Prompt]:
        """Makes it a list of texts, or of lists of tokens."""
        several = [prompt] if isinstance(prompt, str) or _are_tokens(prompt) else prompt
        is_list = isinstance(several, list) and len(several) > 0
        if not is_list or not (
            all(isinstance(x, str) for x in several) or all(map(_are_tokens, several))
        ):
            raise ValueError(
                "must be a text or a list of tokens, or a list of several such"
            )
        if not all(several) and not all(isinstance(x, str) for x in several):
            raise ValueError("must not be empty")
        for one in several:
            if isinstance(one, str):
                _check_unicode(one)
        return several

    @pydantic.model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo=true and logprobs exclude each other: prompts have none here"
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    type: str
    text: Text

    @pydantic.field_validator("type")
    @classmethod
    def _check_type(cls, kind: str) -> str:
        if kind != "text":
            raise ValueError("must be 'text': the model reads nothing else")
        return kind


class AskedMessage(_Strict):
    role: str
    content: list[TextPart]
    name: Text | None = None

    @pydantic.field_validator("role")
    @classmethod
    def _check_role(cls, role: str) -> str:
        if role not in ("system", "developer", "user", "assistant"):
            raise ValueError("must be system, developer, user or assistant")
        return role

    @pydantic.field_validator("content", mode="before")
    @classmethod
    def _one_part(cls, content: Any) -> Any:
        is_text = isinstance(content, str)
        return [{"type": "text", "text": content}] if is_text else content

    def for_template(self) -> dict[str, str]:
        """Returns what a chat template reads."""
        content = "\n".join(part.text for part in self.content)
        found = {"role": self.role, "content": content}
        return found if self.name is None else found | {"name": self.name}


class AskedChat(AskedTokens):
    """A request for the next message of a conversation."""

    messages: list[AskedMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def read(kind: type[A], body: bytes) -> A:
    """Returns the request of a body.

    Raises:
      Refused: with status 400, and what is wrong in one line.
    """
    try:
        given = json.loads(body)
    except ValueError as error:  # it isn't UTF-8, or isn't JSON
        raise Refused(400, f"The body is not JSON: {error}.") from error
    except RecursionError as error:
        raise Refused(400, "The body nests too deep.") from error
    if not isinstance(given, dict):
        raise Refused(400, "The body must be a JSON object.")
    given = _served(given, _UNSERVED)
    messages = given.get("messages")
    if isinstance(messages, list):
        given["messages"] = [
            _served(message, _UNSERVED_OF_MESSAGE, f"messages[{i}].")
            if isinstance(message, dict)
            else message
            for i, message in enumerate(messages)
        ]
    try:
        return kind.model_validate(given)
    except pydantic.ValidationError as error:
        raise _refused(error) from error


def _served(
    given: Mapping[str, Any], unserved: Mapping[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """Returns the fields that are served; refuses others that ask for something."""
    for field in given.keys() & unserved.keys():
        value, allowed = given[field], unserved[field]
        if value is not None and value not in allowed:
            shown = f"{where}{field}={reprlib.repr(value)}"
            but = f", but for {json.dumps(allowed[0])}" if allowed else ""
            raise Refused(400, f"{shown}: this isn't served here{but}.", where + field)
    return {field: given[field] for field in given if field not in unserved}


def _refused(error: pydantic.ValidationError) -> Refused:
    """Returns the refusal that tells of the first mistake."""
    first = error.errors(include_url=False)[0]
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
    ).removeprefix(".")
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"{reprlib.repr(path)} is no field that is known here."
    elif first["type"] == "missing":
        message = f"{path} is needed."
    elif not path:
        message = f"{reason}."
    else:
        message = f"{path}={reprlib.repr(first['input'])}: {reason}."
    return Refused(400, message, path or None)


def _are_tokens(given: Any) -> bool:
    """Returns whether it is a list of token ids, or an empty list."""
    return isinstance(given, list) and all(type(token) is int for token in given)
