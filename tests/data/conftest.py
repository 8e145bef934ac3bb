"""Small sources, and a tokenizer that suits them."""

import pathlib

import pytest

from jmoe.config.data import DataConfig, SourceConfig
from jmoe.data.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["the cat sat on the mat"] * 10, 280), eos_id=0)


@pytest.fixture
def write_source(tmp_path):
    """Writes documents that spell their source and number, such as `<fish 12>`."""

    def write(name: str, num_documents: int) -> pathlib.Path:
        path = tmp_path / f"{name}.txt"
        documents = (f"<{name} {i}>" * (2 + i % 7) for i in range(num_documents))
        path.write_text("<|endoftext|>".join(documents))
        return path

    return write


@pytest.fixture
def data_config(tmp_path):
    """A configuration of rows of 16 over these files, with a cache of its own."""

    def config(*paths: pathlib.Path, weights=None, **fields) -> DataConfig:
        sources = tuple(
            SourceConfig(path=str(path), weight=weight)
            for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True)
        )
        fields = {"sequence_length": 16, "validation_fraction": 0.2} | fields
        return DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"), **fields)

    return config
