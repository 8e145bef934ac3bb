"""The bytes that each token stands for, also where they are only part of a character.

Decoders show such a token as U+FFFD, and drop the blank that opens a text.
"""

import json
import re

import tokenizers

_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how vocabularies that fall back call a byte


class TokenBytes:
    """Tells the bytes that a token has inside of a text."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        decoder = json.dumps(json.loads(backend.to_str())["decoder"])
        self._is_byte_level = '"ByteLevel"' in decoder
        self._falls_back = '"ByteFallback"' in decoder
        self._added = backend.get_added_tokens_decoder()
        self._known: dict[int, bytes] = {}

    def __call__(self, token: int) -> bytes:
        """Returns its bytes; none for one beyond the vocabulary."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        if self._is_byte_level and all(x in _BYTE_OF for x in name):
            return bytes(_BYTE_OF[x] for x in name)
        if self._falls_back and (found := _BYTE.fullmatch(name)):
            return bytes([int(found[1], 16)])
        once, twice = (
            self._backend.decode([token] * count, skip_special_tokens=False)
            for count in (1, 2)
        )
        return twice[len(once) :].encode()


def _byte_of() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for.

    Latin-1's printable characters are themselves, and those behind it the other bytes
    in their order (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    return found | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()
