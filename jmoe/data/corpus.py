"""A source as one flat array of tokens on disk, tokenised once.

Every document is stored as its separator followed by its tokens, and one more separator
ends the last, so that the slice of some neighbouring documents plus one token is text
where each document is opened and closed. Documents lie in the order of their hashes:
that shuffles them, keeps copies together, and makes the validation set a prefix.

Where a model's texts open with another token than the one that ends them, a separator
is both, and the ending one closes the last document.

Shapes: N documents, S stored tokens.
"""

import array
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import logging

from jmoe.data import cache
from jmoe.data.text import Text, document_hash
from jmoe.data.tokenizer import Tokenizer

_RECIPE = 1  # raise it when the files change, so that no old ones are read
_BATCH_CHARACTERS = 2_000_000
_CHECKED_TOKENS = 1 << 24  # at a time


class Corpus(NamedTuple):
    """Memory-mapped tokens of one source."""

    name: str
    key: str  # stands for the source's text and the tokenizer
    token_S: np.ndarray  # uint16, or int32 for a vocabulary beyond 65536
    start_N: np.ndarray  # int64, where each document's separator is
    hash_N: np.ndarray  # uint64, ascending


def tokenize(text: Text, tokenizer: Tokenizer, directory: pathlib.Path) -> Corpus:
    """Tokenises the source, or finds it in `directory` where that was done before.

    Raises:
      ValueError: the source has a bad record, or text that the tokenizer would lose;
        nothing is kept then.
    """
    key = cache.key(_RECIPE, text.fingerprint, tokenizer.fingerprint)
    path = cache.made_once(
        directory / "corpora" / key,
        lambda path: _write(path, text, tokenizer),
        lambda path: _flaw(path, tokenizer),
    )
    return Corpus(text.name, key, *_open(path))


def split(
    corpus: Corpus, validation_fraction: float, sequence_length: int
) -> dict[str, np.ndarray]:
    """The tokens to train on and those to validate on, of different documents.

    Validation takes the documents whose hash, as a number from 0 to 1, lies below
    `validation_fraction`, whatever the source; and the next ones too where those
    don't fill one sequence.

    Raises:
      ValueError: the source is too small for a sequence of each.
    """
    end_N1 = np.append(corpus.start_N, len(corpus.token_S) - 1)
    num_validation = max(
        int(np.searchsorted(corpus.hash_N, np.uint64(validation_fraction * 2**64))),
        int(np.searchsorted(end_N1, sequence_length)),
    )
    if num_validation <= len(corpus.hash_N):
        copy = corpus.hash_N[num_validation - 1]
        num_validation = int(np.searchsorted(corpus.hash_N, copy, side="right"))
        end = end_N1[num_validation]
        if len(corpus.token_S) - end > sequence_length:
            return {
                "train": corpus.token_S[end:],
                "validation": corpus.token_S[: end + 1],
            }
    raise ValueError(
        f"{corpus.name}: {len(corpus.hash_N)} documents of {len(corpus.token_S)} "
        "tokens in all are too few for one sequence to train on and one to validate "
        f"on, with sequence_length={sequence_length} and "
        f"validation_fraction={validation_fraction}."
    )


def _open(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    token_S = np.load(path / "token.npy", mmap_mode="r")
    return token_S, np.load(path / "start.npy"), np.load(path / "hash.npy")


def _flaw(path: pathlib.Path, tokenizer: Tokenizer) -> str | None:
    """What the files can't be as `_write` made them by; None if nothing.

    Reads all tokens, which takes less than the sum of the text they come from.
    """
    try:
        token_S, start_N, hash_N = _open(path)
    except (OSError, ValueError, EOFError) as error:
        return str(error)
    shapes = token_S.ndim, start_N.shape
    if shapes != (1, hash_N.shape) or token_S.dtype != _dtype(tokenizer):
        return "its arrays have other shapes or types"
    bound_N = np.append(start_N, len(token_S) - 1)
    if bound_N[0] != 0 or not (np.diff(bound_N) > 0).all():
        return "its documents lie elsewhere"
    if not (token_S[bound_N] == tokenizer.eos_id).all():
        return "its documents aren't apart"
    for start in range(0, len(token_S), _CHECKED_TOKENS):
        part_S = token_S[start : start + _CHECKED_TOKENS]
        if part_S.max() >= tokenizer.vocab_size or part_S.min() < 0:
            return f"it has tokens outside of vocab_size={tokenizer.vocab_size}"
    return None


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger | np.signedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32


def _write(path: pathlib.Path, text: Text, tokenizer: Tokenizer) -> None:
    """Tokenises in the order of reading, then copies in the order of the hashes."""
    logging.info("Tokenising %s into %s.", text.name, path)
    dtype = _dtype(tokenizer)
    lengths, hashes = array.array("q"), array.array("Q")
    unordered = path / "unordered"
    with unordered.open("wb") as file:
        for documents in _batches(text.documents()):
            hashes.extend(map(document_hash, documents))
            for ids in tokenizer.encode_batch(documents):
                np.array([*tokenizer.separator, *ids], dtype).tofile(file)
                lengths.append(len(tokenizer.separator) + len(ids))
    length_N, hash_N = np.asarray(lengths), np.asarray(hashes)
    end_N = np.cumsum(length_N)
    order_N = np.argsort(hash_N, kind="stable")
    start_N = np.cumsum(length_N[order_N]) - length_N[order_N]

    read_S = np.memmap(unordered, dtype, mode="r")
    token_S = np.lib.format.open_memmap(
        path / "token.npy", "w+", dtype, shape=(len(read_S) + 1,)
    )
    for start, document in zip(start_N, order_N, strict=True):
        length, end = length_N[document], end_N[document]
        token_S[start : start + length] = read_S[end - length : end]
    token_S[-1] = tokenizer.eos_id
    token_S.flush()
    unordered.unlink()
    np.save(path / "start.npy", start_N)
    np.save(path / "hash.npy", hash_N[order_N])


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Groups of documents large enough to keep every core busy."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
