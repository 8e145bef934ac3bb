"""Pieces of a source, each tokenised into files of its own: the unit that is gone on
from after a process was killed.

A part is three files of plain numbers, and a report that is written when they are on
the disk. They are written by plain writes: `jmoe.data.durable` says why.

Shapes: M documents in the order of reading, N their tokens.
"""

import array
import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jmoe.data import durable, readers
from jmoe.data.readers import Piece
from jmoe.data.text import document_hash
from jmoe.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 2_000_000

Add = Callable[[int, int], None]  # is told of documents and tokens


class Report(NamedTuple):
    """What was found in a piece. examples: of what was skipped."""

    documents: int
    tokens: int
    skipped: int
    examples: list[str]


class Part(NamedTuple):
    """The tokens of a piece, each document's after its separator."""

    token_N: np.ndarray
    length_M: np.ndarray
    hash_M: np.ndarray


class Parts:
    """The parts that lie in `directory`, by the number of their piece.

    Args:
      text_field, on_corrupt: those of the source.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        tokenizer: Tokenizer,
        text_field: str,
        on_corrupt: str,
    ):
        self.directory = directory
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.on_corrupt = on_corrupt
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)

    def report(self, number: int) -> Report | None:
        """Returns the report of a finished part; None if it isn't there whole."""
        token, length, hashes, report = self._paths(number)
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = Report(**json.loads(report.read_text()))
            sizes = found.tokens * self.dtype.itemsize, 8 * found.documents
            files = (token, sizes[0]), (length, sizes[1]), (hashes, sizes[1])
            if all(os.stat(path).st_size == size for path, size in files):
                return found
        return None

    def read(self, number: int) -> Part:
        """Returns a part that holds documents; its tokens are read when touched."""
        token, length, hashes, _ = self._paths(number)
        return Part(
            np.memmap(token, self.dtype, mode="r"),
            np.fromfile(length, np.int64),
            np.fromfile(hashes, np.uint64),
        )

    def make(self, number: int, piece: Piece, add: Add) -> Report:
        """Tokenises a piece.

        Raises:
          ValueError: it has a corrupt record, which is refused, or text that the
            tokenizer would lose; names the file.
          OSError: the disk is full; names the part.
        """
        token, length, hashes, report = self._paths(number)
        skipped, lengths, seen = readers.Skipped(), array.array("q"), array.array("Q")
        try:
            with durable.naming(token), token.open("wb") as file:
                for batch in self._read(piece, skipped):
                    seen.extend(map(document_hash, batch))
                    every = self._encode(piece, batch)
                    lengths.extend(map(len, every))
                    file.write(np.concatenate(every).data)
                    add(len(batch), sum(map(len, every)))
        except BaseException:
            token.unlink(missing_ok=True)
            raise
        durable.sync(token)
        durable.write_bytes(length, lengths.tobytes())
        durable.write_bytes(hashes, seen.tobytes())
        made = Report(len(seen), sum(lengths), skipped.count, skipped.examples)
        durable.write_text(report, json.dumps(made._asdict()))
        return made

    def _read(self, piece: Piece, skipped: readers.Skipped) -> Iterator[list[str]]:
        """Yields documents in groups large enough to keep every thread busy."""
        batch, size = [], 0
        for document in readers.documents(
            piece, self.text_field, self.on_corrupt, skipped
        ):
            batch.append(document)
            size += len(document)
            if size > _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _encode(self, piece: Piece, batch: list[str]) -> list[np.ndarray]:
        """Returns the tokens of each document, after its separator."""
        try:
            every = self.tokenizer.encode_batch(batch)
        except ValueError as error:
            raise ValueError(f"{piece.path}: {error}") from error
        separator = self.tokenizer.separator
        return [np.array([*separator, *ids], self.dtype) for ids in every]

    def _paths(self, number: int) -> list[pathlib.Path]:
        names = ("token", "length", "hash", "json")
        return [self.directory / f"{number:06d}.{name}" for name in names]
