"""Tokens as log-probabilities call them, also where they are parts of characters."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jmoe.data.tokenizer import Tokenizer, train_bpe
from jmoe.serve.token_logprobs import Logprobs, name
from jmoe.serve.worker import Increment

BYTES = Tokenizer(train_bpe([], vocab_size=257), eos_id=0)  # a token a byte


def increment(text: str, start: int = 0, stop: int | None = None) -> Increment:
    tokens = BYTES.encode(text)[start:stop]
    logprobs = [-0.5 * i for i in range(len(tokens))]
    top = [{token: -0.25, 0: -1.0} for token in tokens]
    return Increment(0, tokens, logprobs, top, None)


def test_offsets_count_characters_over_increments():
    told = Logprobs(BYTES.token_bytes)
    first, second = (
        told.of_text(increment("a€", 0, 2)),
        told.of_text(increment("a€b", 2)),
    )
    assert first.tokens == ["a", r"bytes:\xe2"]
    assert second.tokens == [r"bytes:\x82", r"bytes:\xac", "b"]
    assert first.text_offset + second.text_offset == [0, 1, 1, 1, 2]


def test_the_token_itself_is_among_the_likely_ones():
    told = Logprobs(BYTES.token_bytes).of_text(increment("ab"))
    assert told.token_logprobs == [0.0, -0.5]
    assert told.top_logprobs[0] == {"a": -0.25, "<|endoftext|>": -1.0}
    rare = Increment(0, [*BYTES.encode("a")], [-9.0], [{0: -1.0}], None)
    (likely,) = Logprobs(BYTES.token_bytes).of_text(rare).top_logprobs
    assert likely == {"<|endoftext|>": -1.0, "a": -9.0}


def test_bytes_of_a_message_add_up_to_its_text():
    told = Logprobs(BYTES.token_bytes).of_chat(increment("a€b"))
    assert bytes(b for token in told.content for b in token.bytes) == "a€b".encode()
    assert [token.token for token in told.content][1] == r"bytes:\xe2"
    assert told.content[0].top_logprobs[0].token == "a"


def test_a_name_that_is_text_is_the_text():
    assert name("é".encode()) == "é" and name(b"\xc3") == r"bytes:\xc3"


def test_vocabularies_that_fall_back_to_bytes_have_theirs():
    pieces = {"<unk>": 0, "</s>": 1, "▁a": 2, "b": 3, "<0xE2>": 4, "é": 5}
    backend = tokenizers.Tokenizer(models.BPE(pieces, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    of = Tokenizer(backend, eos_id=1).token_bytes
    assert [of(token) for token in range(1, 6)] == [
        b"</s>",
        b" a",
        b"b",
        b"\xe2",
        "é".encode(),
    ]
    assert of(99) == b""
