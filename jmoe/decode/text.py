"""A completion's text while it grows: each piece once, and only what will stay.

Tokens are parts of a UTF-8 text that needn't end where a character does; what a decoder
shows of an incomplete one changes with the next token. And what may be the beginning of
a stop text is no part of the completion if it is.
"""

from collections.abc import Callable, Sequence

Text = Callable[[Sequence[int]], str]

INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character
_LONGEST = 3  # bytes of a character that wait for its last one


class TextStream:
    """Tokens go in by `add`, which returns the text that they add for certain.

    Args:
      text: of tokens.
      context: tokens right before the completion, with which its first ones are
        decoded: some tokenizers begin a text otherwise than they go on.
      stop_texts: the completion ends before the one that is complete first.

    Attributes:
      is_stopped: whether a stop text was found; nothing comes after it.
    """

    def __init__(
        self,
        text: Text,
        context: Sequence[int] = (),
        stop_texts: Sequence[str] = (),
    ):
        self._text = text
        self._stop_texts = stop_texts
        # Decoding all tokens again for each new one would cost the square of them. So
        # it is of the last ones, from where a character begins.
        self._window = list(context)
        self._num_context = len(self._window)
        self._num_shown = len(text(self._window)) if self._window else 0
        self._kept = ""  # it may be the beginning of a stop text
        self.is_stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that is certain now, and was not before."""
        if not tokens:
            return ""
        self._window += tokens
        text = self._text(self._window)
        complete = max(len(text.rstrip(INCOMPLETE)), len(text) - _LONGEST)
        new = text[self._num_shown : complete]
        self._num_shown = max(self._num_shown, complete)
        if complete == len(text):
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_shown = len(self._text(self._window))
        return self._before_stop(new)

    def end(self) -> str:
        """Returns what was kept back, now that there are no more tokens."""
        rest = self._text(self._window)[self._num_shown :] if self._window else ""
        return self._before_stop(rest) + self._kept

    def _before_stop(self, new: str) -> str:
        """Returns of the text that goes on with `new` what is before any stop text."""
        if self.is_stopped:
            return ""
        text = self._kept + new
        found = [
            (at + len(stop), at)
            for stop in self._stop_texts
            if (at := text.find(stop)) >= 0
        ]
        if found:
            self.is_stopped, self._kept = True, ""
            _, start = min(found)
            return text[:start]
        kept = max((_overlap(text, stop) for stop in self._stop_texts), default=0)
        self._kept = text[len(text) - kept :]
        return text[: len(text) - kept]


def whole(stream: TextStream, tokens: Sequence[int]) -> str:
    """Returns the text of a completion that has ended, by a stream that is new."""
    return stream.add(tokens) + stream.end()


def _overlap(text: str, stop: str) -> int:
    """Returns how much of the text's end a stop text could begin with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
