"""A source as one flat array of tokens on disk, tokenised once.

Every document is stored as its separator followed by its tokens, and one more separator
ends the last, so that the slice of some neighbouring documents plus one token is text
where each document is opened and closed. Documents lie in the order of their hashes:
that shuffles them, keeps copies together, and makes the validation set a prefix.

Where a model's texts open with another token than the one that ends them, a separator
is both, and the ending one closes the last document.

    token.npy    [N], uint16, or int32 for a vocabulary beyond 65536
    start.npy    [M] int64, where each document's separator is
    hash.npy     [M] uint64, ascending
    corpus.json  what was skipped, and the seals of these files (`jmoe.data.arrays`)

Shapes: M documents, N stored tokens.
"""

import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from jmoe.data import arrays, cache, durable, readers, workers
from jmoe.data.parts import Part, Parts, Report
from jmoe.data.progress import Progress
from jmoe.data.readers import Piece
from jmoe.data.text import Text
from jmoe.data.tokenizer import Tokenizer

_RECIPE = 2  # raise it when the files change, so that no old ones are read
_DESCRIPTION = "corpus.json"
_FILES = ("token.npy", "start.npy", "hash.npy")


class Corpus(NamedTuple):
    """Memory-mapped tokens of one source."""

    name: str
    key: str  # stands for the source's text and the tokenizer
    token_N: np.ndarray
    start_M: np.ndarray
    hash_M: np.ndarray


def tokenize(text: Text, tokenizer: Tokenizer, directory: pathlib.Path) -> Corpus:
    """Tokenises the source, or finds it in `directory` where that was done before.

    What is found is read as a whole only if somebody has written to it since. An
    attempt that was ended is gone on with from its last finished pieces.

    Raises:
      ValueError: the source has a corrupt record, which it refuses, or text that the
        tokenizer would lose.
      OSError: the disk is full; names the file.
    """
    key = cache.key(_RECIPE, text.fingerprint, tokenizer.fingerprint)
    path = directory / "corpora" / key
    if not cache.holds(path, _flaw):
        with cache.partial(path) as parts:
            cache.made_once(
                path, lambda made: _make(made, parts, text, tokenizer), _flaw
            )
    description = json.loads((path / _DESCRIPTION).read_text())
    if description["skipped"] and text.on_corrupt == "refuse":
        readers.refuse(readers.Skipped(), description["examples"][0])
    return Corpus(text.name, key, *(arrays.read(path / name) for name in _FILES))


def split(
    corpus: Corpus, validation_fraction: float, sequence_length: int
) -> dict[str, np.ndarray]:
    """Returns tokens to train on and tokens to validate on, of different documents.

    Validation takes the documents whose hash, as a number from 0 to 1, lies below
    `validation_fraction`, whatever the source; and the next ones too where those
    don't fill one sequence.

    Raises:
      ValueError: the source is too small for a sequence of each.
    """
    end_M1 = np.append(corpus.start_M, len(corpus.token_N) - 1)
    num_validation = max(
        int(np.searchsorted(corpus.hash_M, np.uint64(validation_fraction * 2**64))),
        int(np.searchsorted(end_M1, sequence_length)),
    )
    if num_validation <= len(corpus.hash_M):
        copy = corpus.hash_M[num_validation - 1]
        num_validation = int(np.searchsorted(corpus.hash_M, copy, side="right"))
        end = end_M1[num_validation]
        if len(corpus.token_N) - end > sequence_length:
            return {
                "train": corpus.token_N[end:],
                "validation": corpus.token_N[: end + 1],
            }
    raise ValueError(
        f"{corpus.name}: {len(corpus.hash_M)} documents of {len(corpus.token_N)} "
        "tokens in all are too few for one sequence to train on and one to validate "
        f"on, with sequence_length={sequence_length} and "
        f"validation_fraction={validation_fraction}."
    )


def _flaw(path: pathlib.Path) -> str | None:
    """Returns what of the files isn't as it was written; None if nothing."""
    try:
        description = json.loads((path / _DESCRIPTION).read_text())
        seals = {name: arrays.Seal(*description["files"][name]) for name in _FILES}
        touched = [
            name for name in _FILES if not arrays.is_untouched(path / name, seals[name])
        ]
        for name in touched:
            found = arrays.seal(path / name)
            if (found.size, found.sums) != (seals[name].size, seals[name].sums):
                return f"{name} was altered or cut short"
            seals[name] = found
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    if touched:  # copied, say
        _reseal(path, {**description, "files": seals})
    return None


def _reseal(path: pathlib.Path, description: dict[str, Any]) -> None:
    """Saves the next start from reading it all again, if the cache can be written."""
    try:
        durable.write_text(path / _DESCRIPTION, json.dumps(description))
    except OSError as error:
        logging.info("%s stays as it is: %s", path, error)


def _make(
    path: pathlib.Path, directory: pathlib.Path, text: Text, tokenizer: Tokenizer
) -> None:
    """Tokenises in the order of reading, then copies in the order of the hashes."""
    parts = Parts(directory, tokenizer, text.text_field, text.on_corrupt)
    pieces = text.pieces()
    reports = _tokenize_pieces(text, pieces, parts)
    counts = Counter()
    for piece, report in zip(pieces, reports, strict=True):
        counts[piece.path] += report.documents
    text.require_text(counts)
    full = [number for number, report in enumerate(reports) if report.documents]
    _order(path, [parts.read(number) for number in full], parts.dtype, tokenizer.eos_id)
    examples = [example for report in reports for example in report.examples]
    description = {
        "documents": sum(counts.values()),
        "skipped": sum(report.skipped for report in reports),
        "examples": examples[: readers.EXAMPLES],
        "files": {name: arrays.seal(path / name) for name in _FILES},
    }
    durable.write_text(path / _DESCRIPTION, json.dumps(description))
    if description["skipped"]:
        _warn_of_skipped(text, description)


def _tokenize_pieces(text: Text, pieces: Sequence[Piece], parts: Parts) -> list[Report]:
    """Makes the parts that there aren't yet, and shows how far it is."""
    found = {}
    for number in range(len(pieces)):
        report = parts.report(number)
        if report is not None:
            found[number] = report
    tasks = [task for task in enumerate(pieces) if task[0] not in found]
    sizes = [piece.size for piece in pieces]
    with Progress(text.name, sum(sizes), sum(sizes[x] for x in found)) as progress:
        made = workers.make_parts(parts, tasks, progress.add)
        for (number, piece), report in zip(tasks, made, strict=True):
            found[number] = report
            progress.finish(piece.size)
    return [found[number] for number in range(len(pieces))]


def _order(
    path: pathlib.Path, parts: Sequence[Part], dtype: np.dtype, eos_id: int
) -> None:
    """Writes the documents of all parts in the order of their hashes."""
    counts = [len(part.length_M) for part in parts]
    part_M = np.repeat(np.arange(len(parts)), counts)
    length_M = np.concatenate([part.length_M for part in parts])
    hash_M = np.concatenate([part.hash_M for part in parts])
    first_M = np.concatenate(  # where in its part a document is
        [np.cumsum(part.length_M) - part.length_M for part in parts]
    )
    order_M = np.argsort(hash_M, kind="stable")

    def documents() -> Iterator[np.ndarray]:
        for document in order_M:
            start = first_M[document]
            token_N = parts[int(part_M[document])].token_N
            yield token_N[start : start + length_M[document]]
        yield np.array([eos_id], dtype)

    start_M = np.cumsum(length_M[order_M]) - length_M[order_M]
    total = int(length_M.sum()) + 1
    arrays.write(path / "token.npy", dtype, total, documents())
    arrays.write(path / "start.npy", np.int64, len(start_M), [start_M])
    arrays.write(path / "hash.npy", np.uint64, len(hash_M), [hash_M[order_M]])


def _warn_of_skipped(text: Text, description: dict[str, Any]) -> None:
    logging.warning(
        "%s: %d corrupt records skipped, %d documents kept; the first: %s",
        text.name,
        description["skipped"],
        description["documents"],
        description["examples"][0],
    )
