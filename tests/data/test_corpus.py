"""The tokenised source: nothing lost, ordered by hash, fairly split."""

import json
import os
import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from jmoe.data import arrays, corpus, parts, text
from jmoe.data.tokenizer import Tokenizer


def tokenize(cfg, tokenizer, tmp_path):
    (source,) = text.open_sources(cfg)
    return corpus.tokenize(source, tokenizer, tmp_path / "cache")


def documents_in(tokens: corpus.Corpus, tokenizer) -> list[str]:
    ends = np.append(tokens.start_M, len(tokens.token_N) - 1)
    return [
        tokenizer.decode(tokens.token_N[start + 1 : end])
        for start, end in zip(ends[:-1], ends[1:], strict=True)
    ]


def test_every_document_is_stored_once_between_separators(
    tokenizer, write_source, data_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(parts, "_BATCH_CHARACTERS", 100)
    cfg = data_config(write_source("fish", 50))
    (source,) = text.open_sources(cfg)
    tokens = tokenize(cfg, tokenizer, tmp_path)
    assert sorted(documents_in(tokens, tokenizer)) == sorted(source.documents())
    separators = np.flatnonzero(tokens.token_N == tokenizer.eos_id)
    assert separators.tolist() == [*tokens.start_M, len(tokens.token_N) - 1]


def test_documents_are_ordered_by_their_hashes_whatever_order_they_came_in(
    tokenizer, data_config, tmp_path
):
    documents = [f"number {i}" for i in range(20)]
    stored = []
    for name, order in (("up", documents), ("down", documents[::-1])):
        path = tmp_path / f"{name}.txt"
        path.write_text("<|endoftext|>".join(order))
        tokens = tokenize(data_config(path), tokenizer, tmp_path)
        stored.append(documents_in(tokens, tokenizer))
    assert stored[0] == stored[1] == sorted(documents, key=text.document_hash)
    assert tokens.hash_M.tolist() == sorted(map(text.document_hash, documents))


def test_a_large_vocabulary_is_stored_in_more_bits(data_config, tmp_path):
    words = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    (tmp_path / "a.txt").write_text("w69999")
    tokens = tokenize(
        data_config(tmp_path / "a.txt"), Tokenizer(backend, eos_id=70_000), tmp_path
    )
    assert tokens.token_N.tolist() == [70_000, 69_999, 70_000]


def test_what_was_tokenised_is_found_again(
    tokenizer, write_source, data_config, tmp_path, monkeypatch
):
    cfg = data_config(write_source("fish", 5))
    first = tokenize(cfg, tokenizer, tmp_path)
    monkeypatch.setattr(corpus, "_make", lambda *_: pytest.fail("written again"))
    again = tokenize(cfg, tokenizer, tmp_path)
    assert np.array_equal(first.token_N, again.token_N)
    assert first.key == again.key


def test_a_bad_record_leaves_nothing_in_the_cache(tokenizer, data_config, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    with pytest.raises(ValueError, match="lines.jsonl: line 2"):
        tokenize(data_config(path), tokenizer, tmp_path)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_what_was_skipped_is_told_kept_and_refused_where_it_should_be(
    tokenizer, data_config, tmp_path, caplog
):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "good"}\nbad\n{"text": 3}\n{"text": "also"}\n')
    tokens = tokenize(data_config(path, on_corrupt="skip"), tokenizer, tmp_path)
    assert sorted(documents_in(tokens, tokenizer)) == ["also", "good"]
    assert "2 corrupt records skipped, 2 documents kept; the first: " in caplog.text
    description = tmp_path / "cache" / "corpora" / tokens.key / "corpus.json"
    assert json.loads(description.read_text())["skipped"] == 2
    with pytest.raises(ValueError, match="lines.jsonl: line 2: not JSON"):
        tokenize(data_config(path), tokenizer, tmp_path)


def test_a_part_that_skips_is_refused_by_who_may_not_skip(
    tokenizer, data_config, tmp_path, monkeypatch
):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "good"}\nbad\n')

    def fail(*_):
        raise OSError

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(arrays, "write", fail)
        tokenize(data_config(path, on_corrupt="skip"), tokenizer, tmp_path)
    assert list((tmp_path / "cache").glob("corpora/*.partial/*.json"))
    with pytest.raises(ValueError, match="lines.jsonl: line 2: not JSON"):
        tokenize(data_config(path), tokenizer, tmp_path)


def test_a_part_that_was_cut_short_is_made_again(
    tokenizer, write_source, data_config, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError

    cfg = data_config(write_source("fish", 50))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(arrays, "write", fail)
        tokenize(cfg, tokenizer, tmp_path)
    (part,) = (tmp_path / "cache").glob("corpora/*.partial/*.token")
    cut(part)
    tokens = tokenize(cfg, tokenizer, tmp_path)
    assert len(documents_in(tokens, tokenizer)) == 50


def test_tokens_that_would_be_lost_are_refused_with_the_file(data_config, tmp_path):
    words = tokenizers.models.WordLevel({"<|endoftext|>": 0, "cat": 1})
    (tmp_path / "a.txt").write_text("dog")
    with pytest.raises(ValueError, match="a.txt: .*"):
        tokenize(
            data_config(tmp_path / "a.txt"),
            Tokenizer(tokenizers.Tokenizer(words), eos_id=0),
            tmp_path,
        )


@st.composite
def corpora(draw):
    """Documents of some lengths, few enough hashes that some are copies."""
    lengths = np.array(draw(st.lists(st.integers(2, 30), min_size=1, max_size=30)))
    hashes = draw(
        st.lists(st.integers(0, 40), min_size=len(lengths), max_size=len(lengths))
    )
    return corpus.Corpus(
        name="some.txt",
        key="",
        token_N=np.arange(lengths.sum() + 1),
        start_M=np.cumsum(lengths) - lengths,
        hash_M=np.sort(np.array(hashes, np.uint64)) * np.uint64(2**64 // 41),
    )


@given(corpora(), st.floats(0.01, 0.99), st.integers(1, 60))
def test_a_split_keeps_documents_whole_and_copies_together(tokens, fraction, length):
    try:
        streams = corpus.split(tokens, fraction, length)
    except ValueError:
        assume(False)
    train, validation = streams["train"], streams["validation"]
    assert np.array_equal([*validation[:-1], *train], tokens.token_N)
    assert min(len(train), len(validation)) > length
    first = np.searchsorted(tokens.start_M, train[0])
    assert tokens.start_M[first] == train[0] == validation[-1]
    assert tokens.hash_M[first] > tokens.hash_M[first - 1]
    below = tokens.hash_M < fraction * 2**64
    assert not below[first:].any()
    if not below[first - 1]:  # taken only to fill a sequence
        copies = tokens.hash_M == tokens.hash_M[first - 1]
        assert tokens.start_M[np.argmax(copies)] < length


@given(corpora(), st.integers(1, 60))
def test_a_split_is_refused_only_where_there_is_none(tokens, length):
    ends = np.append(tokens.start_M, len(tokens.token_N) - 1)
    changes = np.flatnonzero(np.diff(tokens.hash_M)) + 1
    possible = [
        end
        for end in ends[changes]
        if end >= length and len(tokens.token_N) - end > length
    ]
    if possible:
        assert corpus.split(tokens, 1e-9, length)
    else:
        with pytest.raises(ValueError, match=f"sequence_length={length}"):
            corpus.split(tokens, 1e-9, length)


def test_the_share_of_validation_documents_is_the_fraction(
    tokenizer, write_source, data_config, tmp_path
):
    tokens = tokenize(data_config(write_source("fish", 2000)), tokenizer, tmp_path)
    streams = corpus.split(tokens, 0.2, 16)
    documents = np.sum(streams["validation"] == tokenizer.eos_id) - 1
    assert abs(documents - 400) < 4 * np.sqrt(2000 * 0.2 * 0.8)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def replace(index, value):
    """Replaces an array's file."""

    def change(path):
        array = np.load(path)
        array[index] = value
        np.save(path, array)

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("token.npy", cut),
        ("token.npy", replace(1, 65535)),
        ("token.npy", replace(-1, 5)),
        ("token.npy", pathlib.Path.unlink),
        ("start.npy", replace(0, 1)),
        ("hash.npy", lambda path: path.write_bytes(b"")),
        ("hash.npy", lambda path: np.save(path, np.array([object]))),
        ("corpus.json", cut),
        ("corpus.json", lambda path: path.write_text('{"files": 3}')),
        ("corpus.json", pathlib.Path.unlink),
    ],
)
def test_a_damaged_cache_is_made_again(
    tokenizer, write_source, data_config, tmp_path, caplog, name, change
):
    cfg = data_config(write_source("fish", 5))
    first = tokenize(cfg, tokenizer, tmp_path)
    stored = [np.array(array) for array in first[2:]]
    change(tmp_path / "cache" / "corpora" / first.key / name)
    again = tokenize(cfg, tokenizer, tmp_path)
    assert f"{first.key} is damaged" in caplog.text
    assert "making it again" in caplog.text
    assert all(map(np.array_equal, again[2:], stored))


def test_a_copied_cache_is_read_once_and_then_trusted(
    tokenizer, write_source, data_config, tmp_path, monkeypatch
):
    cfg = data_config(write_source("fish", 5))
    key = tokenize(cfg, tokenizer, tmp_path).key
    os.utime(tmp_path / "cache" / "corpora" / key / "token.npy", (1, 1))
    sealed = []
    monkeypatch.setattr(
        arrays, "seal", lambda path, seal=arrays.seal: sealed.append(path) or seal(path)
    )
    for _ in range(2):
        tokenize(cfg, tokenizer, tmp_path)
    assert [path.name for path in sealed] == ["token.npy"]
