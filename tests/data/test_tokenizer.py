"""The tokenizer: any text survives it, and one that doesn't fit is refused."""

import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jmoe.data import special_tokens
from jmoe.data import tokenizer as tokenizer_lib
from jmoe.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEXT = ["def f(x):\n    return x + 12345\n", "the cat sat on the mat"] * 20


@given(document=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_decodes_to_itself(tokenizer, document):
    token_ids = tokenizer.encode(document)
    assert tokenizer.decode(token_ids) == document
    assert all(0 <= token < tokenizer.vocab_size for token in token_ids)


def test_text_that_spells_the_separator_is_text(tokenizer):
    token_ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in token_ids
    assert tokenizer.decode(token_ids) == "a<|endoftext|>b"


def test_the_separator_decodes_to_its_name(tokenizer):
    assert tokenizer.decode(np.array([tokenizer.eos_id])) == "<|endoftext|>"


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("cat"), 999]) == "cat"


def test_a_batch_is_encoded_as_its_documents_are(tokenizer):
    assert tokenizer.encode_batch(TEXT) == [tokenizer.encode(text) for text in TEXT]


def test_training_twice_gives_the_same_tokenizer():
    first, second = (train_bpe(TEXT, 300).to_str() for _ in range(2))
    assert first == second


def test_digits_stand_alone_and_words_are_merged():
    trained = Tokenizer(train_bpe(TEXT, 400), eos_id=0)
    assert len(trained.encode("12345")) == 5
    assert len(trained.encode("the cat")) == 2


def test_the_vocabulary_is_at_most_the_size_asked_for():
    assert train_bpe(TEXT, 270).get_vocab_size() == 270
    assert train_bpe(["ab"], 10_000).get_vocab_size() < 270
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_bpe(TEXT, 256)


def test_a_saved_tokenizer_does_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.eos_id, loaded.vocab_size) == (0, tokenizer.vocab_size)
    assert loaded.encode("a<|endoftext|>") == tokenizer.encode("a<|endoftext|>")


def test_a_trained_tokenizer_is_kept_for_its_text_and_size(
    write_source, data_config, monkeypatch
):
    cfg = data_config(write_source("fish", 50))
    other = data_config(write_source("bird", 50))
    first = load_tokenizer(cfg, 300)
    assert load_tokenizer(cfg, 260).vocab_size == 260
    assert load_tokenizer(other, 300).fingerprint != first.fingerprint
    monkeypatch.setattr(tokenizer_lib, "train_bpe", lambda *_: pytest.fail("again"))
    assert load_tokenizer(cfg, 300).fingerprint == first.fingerprint


def test_a_source_has_its_weight_in_the_training_sample(
    write_source, data_config, monkeypatch
):
    monkeypatch.setattr(tokenizer_lib, "SAMPLE_CHARACTERS", 4_000)
    cfg = data_config(
        write_source("fish", 300), write_source("bird", 300), weights=[3, 1]
    )
    size = {}

    def train(documents, vocab_size):
        documents = list(documents)
        for name in ("fish", "bird"):
            size[name] = sum(len(text) for text in documents if name in text)
        return train_bpe(documents, vocab_size)

    monkeypatch.setattr(tokenizer_lib, "train_bpe", train)
    load_tokenizer(cfg, 300)
    assert size["fish"] == pytest.approx(3_000, rel=0.1)
    assert size["bird"] == pytest.approx(1_000, rel=0.1)


@pytest.mark.parametrize("name", special_tokens.END_OF_TEXT)
def test_the_users_tokenizer_is_taken_with_its_own_separator(
    tmp_path, data_config, name
):
    path = tmp_path / "tokenizer.json"
    vocabulary = {"cat": 0, "mat": 1, name: 2}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary)).save(str(path))
    loaded = load_tokenizer(data_config(path, tokenizer=str(path)), 3)
    assert (loaded.eos_id, loaded.vocab_size) == (2, 3)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer, tmp_path, data_config):
    tokenizer.save(tmp_path / "big.json")
    cfg = data_config(tmp_path, tokenizer=str(tmp_path / "big.json"))
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match=f"has {size} tokens.*vocab_size={size - 1}"):
        load_tokenizer(cfg, size - 1)
    assert load_tokenizer(cfg, size).vocab_size == size


@pytest.mark.parametrize("content", ["not JSON", '{"no": "tokenizer"}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(ValueError, match="odd.json' is not a tokenizer.json"):
        Tokenizer.from_file(tmp_path / "odd.json")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        Tokenizer.from_file(tmp_path / "absent.json")


def test_a_tokenizer_without_a_separator_is_refused(tmp_path):
    path = tmp_path / "bare.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"cat": 0})).save(str(path))
    with pytest.raises(ValueError, match=r"bare.json' has none.*<\|endoftext\|>"):
        Tokenizer.from_file(path)


def test_a_damaged_cached_tokenizer_is_trained_again(write_source, data_config):
    cfg = data_config(write_source("fish", 20))
    first = load_tokenizer(cfg, 280)
    (path,) = pathlib.Path(cfg.cache_dir).rglob("tokenizer.json")
    path.write_text(path.read_text()[:100])
    assert load_tokenizer(cfg, 280).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "leave",
    [
        lambda backend: backend.enable_truncation(8),
        lambda backend: backend.enable_padding(length=128, pad_id=5, pad_token="%"),
        lambda backend: backend.enable_padding(pad_id=5, pad_token="%"),
        lambda backend: setattr(backend.model, "dropout", 0.9),
    ],
    ids=["truncation", "padding", "padding_to_the_longest", "dropout"],
)
def test_settings_left_in_a_tokenizer_change_no_document(tmp_path, leave):
    backend = train_bpe(TEXT, 300)
    want = Tokenizer(train_bpe(TEXT, 300), eos_id=0)
    leave(backend)
    backend.save(str(tmp_path / "left.json"))
    got = Tokenizer.from_file(tmp_path / "left.json")
    assert got.encode_batch(TEXT[:2]) == want.encode_batch(TEXT[:2])
    assert got.encode(TEXT[0]) == want.encode(TEXT[0])
    assert got.fingerprint == want.fingerprint


def without_unknown() -> Tokenizer:
    """A BPE of the letters of "hello world"; others it drops without a word."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(["hello world"], trainer)
    return Tokenizer(backend, eos_id=0)


def test_text_that_a_tokenizer_would_lose_is_refused_with_its_first_piece():
    lossy = without_unknown()
    with pytest.raises(ValueError, match="no token for '世界', .* in 'hello 世界 émi"):
        lossy.encode_batch(["hello world", "hello 世界 émigré"])
    with pytest.raises(ValueError, match="no token for '!'"):
        lossy.encode("hello!")
    assert lossy.encode("hello\n world")  # blanks are not lost text


def test_what_a_normalizer_removes_and_an_unknown_token_covers_is_not_lost():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"cafe": 0, "?": 1}, unk_token="?")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]
    )
    known = Tokenizer(backend, eos_id=1)
    assert known.encode("caf\u00e9 cafe\u0301 \u0301 tea") == [0, 0, 1]


def test_a_model_that_fails_at_the_unknown_is_one_error():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0}))
    with pytest.raises(ValueError, match=r"fails at a document: .*\[UNK\]"):
        Tokenizer(backend, eos_id=0).encode("other")


@pytest.mark.parametrize("run", ["A", "=", " ", "\n", "x\u0301", "字"])
def test_no_piece_that_is_merged_is_longer_than_the_limit(run):
    """Training takes the square of a piece's length, and a document may be one word."""
    backend = train_bpe(["text"], 300)
    document = f"a{run * 2000} {run * 3}{run * 700}."
    pieces = backend.pre_tokenizer.pre_tokenize_str(document)
    lengths = [end - start for _, (start, end) in pieces]
    assert sum(lengths) == len(document)
    assert max(lengths) <= 2 * tokenizer_lib.PIECE_CHARACTERS + 1
    assert Tokenizer(backend, 0).decode(Tokenizer(backend, 0).encode(document)) == (
        document
    )
