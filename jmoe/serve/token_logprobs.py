"""Log-probabilities of a completion's tokens, in the two shapes that OpenAI's API has.

A token that is no text by itself, as it is part of a character, is called by its bytes:
`bytes:\\xe2\\x82`.
"""

import codecs
from collections.abc import Callable

from jmoe.serve.openai_answers import ChatLogprobs, ChatToken, LikelyToken, TextLogprobs
from jmoe.serve.worker import Increment

TokenBytes = Callable[[int], bytes]


class Logprobs:
    """Tells them of one completion, as it grows."""

    def __init__(self, token_bytes: TokenBytes):
        self._bytes = token_bytes
        self._offset = 0  # characters before the next token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_text(self, got: Increment) -> TextLogprobs:
        """Returns those of what a completion has grown by."""
        offsets, top = [], []
        likely = got.top_logprobs or [{} for _ in got.tokens]
        for token, own, others in zip(got.tokens, got.logprobs, likely, strict=True):
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._bytes(token)))
            named: dict[str, float] = {}
            for other, logprob in others.items():  # of equal names, the likeliest
                named.setdefault(name(self._bytes(other)), logprob)
            named.setdefault(name(self._bytes(token)), own)
            top.append(named)
        return TextLogprobs(
            tokens=[name(self._bytes(token)) for token in got.tokens],
            token_logprobs=got.logprobs,
            top_logprobs=top,
            text_offset=offsets,
        )

    def of_chat(self, got: Increment) -> ChatLogprobs:
        """Returns those of what a message has grown by."""
        likely = got.top_logprobs or [{} for _ in got.tokens]
        tokens = []
        for token, own, others in zip(got.tokens, got.logprobs, likely, strict=True):
            top = [LikelyToken(**self._fields(*other)) for other in others.items()]
            tokens.append(ChatToken(**self._fields(token, own), top_logprobs=top))
        return ChatLogprobs(content=tokens)

    def _fields(self, token: int, logprob: float) -> dict:
        own = self._bytes(token)
        return {"token": name(own), "logprob": logprob, "bytes": list(own)}


def name(token: bytes) -> str:
    """Returns what a token is called."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(rf"\x{byte:02x}" for byte in token)
