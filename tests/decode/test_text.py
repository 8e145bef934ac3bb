"""Streamed text: whatever the pieces are, together they are the decoded whole."""

import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from jmoe.data.tokenizer import Tokenizer, train_bpe
from jmoe.decode.text import TextStream, whole

BYTES = train_bpe([], vocab_size=257)  # a token for each byte, after the separator
DECODE = Tokenizer(BYTES, eos_id=0).decode


def ids(text: str) -> list[int]:
    return Tokenizer(BYTES, eos_id=0).encode(text)


def pieces(tokens, *args, decode=DECODE) -> list[str]:
    stream = TextStream(decode, *args)
    return [*(stream.add([token]) for token in tokens), stream.end()]


def test_a_character_comes_when_its_last_byte_does():
    assert pieces(ids("a€b")) == ["a", "", "", "€", "b", ""]
    assert pieces(ids("🦜")) == ["", "", "", "🦜", ""]


def test_a_character_that_is_never_finished_comes_at_the_end():
    assert pieces(ids("a€")[:-1]) == ["a", "", "", "\ufffd"]


@given(st.lists(st.integers(0, 256), max_size=24), st.integers(1, 5))
def test_any_bytes_in_any_parts_are_the_decoded_whole(tokens, size):
    stream = TextStream(DECODE)
    parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    text = "".join(map(stream.add, parts)) + stream.end()
    assert text == DECODE(tokens)


@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1), max_size=3))
def test_text_ends_before_the_stop_text_that_is_first_complete(text, stops):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops]
    _, at = min((end for end in ends if end[1] >= 0), default=(0, len(text)))
    shown = text[:at]
    got = pieces(ids(text), (), stops)
    assert "".join(got) == shown
    assert whole(TextStream(DECODE, (), stops), ids(text)) == shown
    assert all(shown.startswith("".join(got[: i + 1])) for i in range(len(got)))


def test_what_may_begin_a_stop_text_is_shown_once_it_does_not():
    assert pieces(ids("a\n\nb"), (), ["\n\n\n"]) == ["a", "", "", "\n\nb", ""]
    assert pieces(ids("a\n"), (), ["\n\n"]) == ["a", "", "\n"]


def test_a_token_reads_as_it_does_after_those_before_it():
    vocabulary = {"▁one": 0, "▁two": 1}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="▁one"))
    backend.decoder = decoders.Metaspace()
    decode = Tokenizer(backend, eos_id=0).decode
    assert pieces([1, 0], [0], decode=decode) == [" two", " one", ""]
    assert pieces([1, 0], decode=decode) == ["two", " one", ""]


def test_bytes_that_are_decoded_one_by_one_wait_for_their_character_too():
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<0x00>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    decode = Tokenizer(backend, eos_id=0).decode
    assert decode("€".encode()[:2]) == "\ufffd\ufffd"
    assert pieces("€".encode(), decode=decode) == ["", "", "€", ""]


def test_what_is_decoded_for_a_new_token_does_not_grow_with_the_text():
    longest = 0

    def decode(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return DECODE(tokens)

    assert "".join(pieces(ids("abc€" * 50), decode=decode)) == "abc€" * 50
    assert longest < 10
