"""On a full disk each program ends in one line with the file, and loses nothing."""

import errno
import os

import numpy as np
import pytest

from jmoe.config.data import DataConfig, SourceConfig
from jmoe.data import corpus, text
from jmoe.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tests.faults import full

DOCUMENTS = [f"<fish {i}>" * (2 + i % 7) for i in range(300)]


@pytest.fixture
def config(tmp_path) -> DataConfig:
    path = tmp_path / "fish.txt"
    path.write_text("<|endoftext|>".join(DOCUMENTS))
    (tmp_path / "cache").mkdir()
    return DataConfig(
        sources=(SourceConfig(path=str(path)),), cache_dir=str(tmp_path / "cache")
    )


def test_tokenising_ends_with_the_file_wherever_the_disk_is_full_and_goes_on(
    config, tmp_path
):
    tokenizer = Tokenizer(train_bpe(["the fish"], 280), eos_id=0)
    (source,) = text.open_sources(config)
    with full.Disk(tmp_path / "whole", room=10**9) as disk:
        whole = corpus.tokenize(source, tokenizer, tmp_path / "whole")
    for room in np.linspace(0, disk.written - 1, 24).astype(int).tolist():
        cache = tmp_path / f"cache {room}"
        with full.Disk(cache, room), pytest.raises(OSError) as error:
            corpus.tokenize(source, tokenizer, cache)
        assert error.value.errno == errno.ENOSPC
        assert str(error.value.filename).startswith(str(cache))
        names = set(os.listdir(cache / "corpora"))
        assert names <= {f"{whole.key}.partial"}  # parts, if there are any
        assert not names or os.listdir(cache / "corpora" / f"{whole.key}.partial")
        again = corpus.tokenize(source, tokenizer, cache)
        assert np.array_equal(again.token_N, whole.token_N)
        assert os.listdir(cache / "corpora") == [again.key]


def test_training_a_tokenizer_ends_with_the_file(config, tmp_path):
    with full.Disk(tmp_path / "cache", room=100), pytest.raises(OSError) as error:
        load_tokenizer(config, 280)
    assert str(error.value).startswith("[Errno 28] No space left on device: '")
    assert "tokenizer.json" in str(error.value.filename)
    assert os.listdir(tmp_path / "cache" / "tokenizers") == []
