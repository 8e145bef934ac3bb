"""Batches: the same whatever happens, each token once, shares as asked for."""

import collections
import itertools
import json
import re

import numpy as np
import pytest

from jmoe.config.data import DataConfig, SourceConfig
from jmoe.data import corpus, text
from jmoe.data import tokenizer as tokenizer_lib
from jmoe.data.loader import make_loader, validation_batches
from jmoe.data.packing import PackedRows
from jmoe.data.tokenizer import load_tokenizer


@pytest.fixture
def mixture(write_source, data_config):
    """Two sources of about 26 and 57 training rows, in shares of 3 to 1."""
    paths = write_source("fish", 15), write_source("bird", 30)
    return data_config(*paths, weights=[3.0, 1.0])


def draw(loader, num_batches):
    batches = list(itertools.islice(loader, num_batches))
    loader.close()
    return batches


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)
        np.testing.assert_array_equal(a.segment_BT, b.segment_BT)


def named(batches, tokenizer):
    """The documents of which a whole mark, such as `<fish 12>`, is in the batches."""
    rows = [row for batch in batches for row in batch.tokens_BT]
    return set(re.findall(r"<\w+ \d+>", "|".join(map(tokenizer.decode, rows))))


def test_a_batch_has_its_shape_and_type(mixture, tokenizer):
    (batch,) = draw(make_loader(mixture, tokenizer, batch_size=6), 1)
    assert batch.is_target_BT is None  # all tokens are
    for array in batch[:2]:
        assert array.shape == (6, 17)
        assert array.dtype == np.int32
    assert (batch.segment_BT[:, 0] == 0).all()


def test_the_batches_follow_from_the_configuration_alone(mixture, tokenizer):
    first, second = (make_loader(mixture, tokenizer, batch_size=4) for _ in range(2))
    assert_same(draw(first, 30), draw(second, 30))


def test_another_seed_gives_another_order(write_source, data_config, tokenizer):
    path = write_source("fish", 50)
    orders = [
        draw(make_loader(data_config(path, seed=seed), tokenizer, batch_size=8), 1)
        for seed in (0, 1)
    ]
    assert not np.array_equal(orders[0][0].tokens_BT, orders[1][0].tokens_BT)


@pytest.mark.parametrize("drawn", [0, 1, 7, 40, 95])
def test_resuming_gives_the_exact_next_batch_in_any_epoch(mixture, tokenizer, drawn):
    expected = draw(make_loader(mixture, tokenizer, batch_size=4), drawn + 5)[drawn:]
    before = make_loader(mixture, tokenizer, batch_size=4)
    draw(before, drawn)
    saved = json.dumps(before.get_state())
    after = make_loader(mixture, tokenizer, batch_size=4)
    after.set_state(json.loads(saved))
    assert after.get_state() == json.loads(saved)
    assert_same(draw(after, 5), expected)


def test_a_loader_can_be_set_back(mixture, tokenizer):
    loader = make_loader(mixture, tokenizer, batch_size=4)
    state = loader.get_state()
    first = [next(loader) for _ in range(3)]
    loader.set_state(state)
    assert_same(draw(loader, 3), first)


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_share_the_global_batch_in_order(mixture, tokenizer, process_count):
    whole = draw(make_loader(mixture, tokenizer, batch_size=6), 20)
    parts = [
        draw(
            make_loader(
                mixture,
                tokenizer,
                batch_size=6,
                process_index=index,
                process_count=process_count,
            ),
            20,
        )
        for index in range(process_count)
    ]
    for expected, *got in zip(whole, *parts, strict=True):
        joined = np.concatenate([part.tokens_BT for part in got])
        np.testing.assert_array_equal(joined, expected.tokens_BT)


def test_a_position_holds_for_another_number_of_processes(mixture, tokenizer):
    alone = make_loader(mixture, tokenizer, batch_size=4)
    draw(alone, 9)
    half = make_loader(
        mixture, tokenizer, batch_size=4, process_index=1, process_count=2
    )
    half.set_state(alone.get_state())
    expected = draw(make_loader(mixture, tokenizer, batch_size=4), 10)[9]
    np.testing.assert_array_equal(next(half).tokens_BT, expected.tokens_BT[2:])
    half.close()


def test_an_epoch_holds_every_row_once_and_the_next_in_another_order(
    write_source, data_config, tokenizer, tmp_path
):
    cfg = data_config(write_source("fish", 40))
    (source,) = text.open_sources(cfg)
    tokens = corpus.tokenize(source, tokenizer, tmp_path / "cache")
    rows = PackedRows(corpus.split(tokens, 0.2, 16)["train"], 16)
    drawn = draw(make_loader(cfg, tokenizer, batch_size=1), 2 * len(rows))
    order = [tuple(batch.tokens_BT[0].tolist()) for batch in drawn]
    first, second = order[: len(rows)], order[len(rows) :]
    expected = sorted(tuple(rows[i].tolist()) for i in range(len(rows)))
    assert sorted(first) == sorted(second) == expected
    assert first != second


def test_sources_have_their_shares_in_every_stretch(mixture, tokenizer):
    batches = draw(make_loader(mixture, tokenizer, batch_size=8), 50)
    from_fish = ["fish" in tokenizer.decode(r) for b in batches for r in b.tokens_BT]
    for start in range(0, 400, 100):
        assert 74 <= sum(from_fish[start : start + 100]) <= 76


def test_validation_documents_are_never_trained_on(mixture, tokenizer):
    trained = named(draw(make_loader(mixture, tokenizer, batch_size=8), 60), tokenizer)
    held_out = named(
        validation_batches(mixture, tokenizer, batch_size=8, num_batches=20), tokenizer
    )
    assert trained.isdisjoint(held_out)
    sources = collections.Counter(re.findall("fish|bird", " ".join(held_out)))
    assert sources["fish"] and sources["bird"]
    assert len(trained | held_out) >= 43


def test_validation_is_the_same_for_every_seed(write_source, data_config, tokenizer):
    path = write_source("fish", 50)
    first, second = (
        validation_batches(
            data_config(path, seed=seed), tokenizer, batch_size=4, num_batches=3
        )
        for seed in (0, 1)
    )
    assert_same(first, second)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size=6.*process_count=4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, "process_index=2"),
        ({"batch_size": 4, "split": "test"}, "split='test'.*train, validation"),
    ],
)
def test_a_mistaken_argument_is_named(mixture, tokenizer, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_loader(mixture, tokenizer, **arguments)


def test_a_position_in_other_data_is_refused(write_source, data_config, tokenizer):
    path = write_source("fish", 50)
    state = make_loader(data_config(path), tokenizer, batch_size=4).get_state()
    for change in ({"seed": 1}, {"sequence_length": 8}, {"validation_fraction": 0.3}):
        loader = make_loader(data_config(path, **change), tokenizer, batch_size=4)
        with pytest.raises(ValueError, match="has changed since"):
            loader.set_state(state)
    write_source("fish", 51)
    with pytest.raises(ValueError, match="has changed since"):
        make_loader(data_config(path), tokenizer, batch_size=4).set_state(state)


def test_a_position_holds_for_the_same_data_at_another_path(
    write_source, data_config, tokenizer, tmp_path
):
    path = write_source("fish", 40)
    before = make_loader(data_config(path), tokenizer, batch_size=4)
    next(before)
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / "other.txt")
    after = make_loader(data_config(moved), tokenizer, batch_size=4)
    after.set_state(before.get_state())
    assert np.array_equal(next(before).tokens_BT, next(after).tokens_BT)
    before.close()
    after.close()


def test_a_position_inside_a_batch_is_refused(mixture, tokenizer):
    small = make_loader(mixture, tokenizer, batch_size=4)
    draw(small, 3)
    large = make_loader(mixture, tokenizer, batch_size=8)
    with pytest.raises(ValueError, match="12 sequences.*batch_size=8"):
        large.set_state(small.get_state())


def test_a_source_too_small_to_split_is_named(write_source, data_config, tokenizer):
    cfg = data_config(write_source("fish", 50), write_source("bird", 1))
    with pytest.raises(ValueError, match="bird.txt: 1 documents.*sequence_length=16"):
        make_loader(cfg, tokenizer, batch_size=4)


def test_a_missing_source_is_found_before_another_is_read(
    write_source, data_config, tokenizer, tmp_path
):
    cfg = data_config(write_source("fish", 50), tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        make_loader(cfg, tokenizer, batch_size=4)
    assert not (tmp_path / "cache").exists()


def test_the_builtin_corpus_trains_its_tokenizer_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_lib, "SAMPLE_CHARACTERS", 1_000_000)
    names = ("builtin:prose", "builtin:arithmetic")
    sources = tuple(SourceConfig(path=name) for name in names)
    cfg = DataConfig(sources=sources, cache_dir=str(tmp_path))
    tokenizer = load_tokenizer(cfg, 2048)
    assert tokenizer.vocab_size == 2048
    batches = draw(make_loader(cfg, tokenizer, batch_size=8), 4)
    rows = [tokenizer.decode(row) for batch in batches for row in batch.tokens_BT]
    assert sum("What is" in row for row in rows) > 5
    assert sum("method" in row for row in rows) > 2
    held_out = validation_batches(cfg, tokenizer, batch_size=8, num_batches=2)
    assert held_out[1].tokens_BT.shape == (8, 257)
