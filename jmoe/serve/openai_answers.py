"""Answers as OpenAI's API has them: whole ones, and the chunks of a stream.

A field is in the JSON if it was given, null too.
"""

from typing import Any, Literal

from pydantic import BaseModel


class Answer(BaseModel):
    def to_json(self) -> bytes:
        return self.model_dump_json(exclude_unset=True).encode()


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(Answer):
    """A completion's: of each token its text, its log-probability, and the likeliest.

    text_offset: where it begins in the choice's text, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class LikelyToken(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    content: list[ChatToken]


class TextChoice(Answer):
    """A completion, or what one has grown by."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = None


class ChatDelta(Answer):
    """What a message has grown by, in a stream."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = None


class Completions(Answer):
    """An answer, or a chunk of it; so many of `choices` as the chunk tells of."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class ServedModel(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int  # positions of a prompt and its answer, as vLLM tells it


class ServedModels(Answer):
    object: Literal["list"]
    data: list[ServedModel]
