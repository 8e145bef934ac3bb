"""File formats: the documents in a file, read in bounded memory.

In .jsonl, .parquet and .arrayrecord files each record is a document. A .txt file with
`<|endoftext|>` in it is divided there; one without is a long text, cut at line ends
into passages of about 8 KiB, so that some can validate what others train.

A large file is read as several pieces, by as many processes. A document belongs to the
piece that it begins in, so that the documents of all pieces are those of the file.
"""

import codecs
import functools
import gzip
import io
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordReader

from jmoe.data import builtin

SEPARATOR = "<|endoftext|>"
_SEPARATOR = SEPARATOR.encode()
PASSAGE_BYTES = 8 * 1024
PIECE_BYTES = 32 * 1024 * 1024  # some 10 s of one core's tokenising
EXAMPLES = 3  # of corrupt records that are kept
_CHUNK_BYTES = 1024 * 1024
_CHUNK_RECORDS = 1024

# What the libraries raise for a file that was cut short or overwritten;
# ArrayRecord has only RuntimeError.
_DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, RuntimeError)
_DAMAGE += (pyarrow.ArrowException, UnicodeDecodeError)


class Piece(NamedTuple):
    """A part of a file.

    path: of the file, or of a source that is none. form: how it is read, a key of
    FORMS. size: about how many bytes. start and stop: in bytes, row groups or records
    of the file; None: its end.
    """

    path: str
    form: str
    size: int = 1
    start: int = 0
    stop: int | None = None

    def ends_before(self, place: int) -> bool:
        return self.stop is not None and place >= self.stop


class Record(NamedTuple):
    """Something that should be a document. parse: raises ValueError if it isn't."""

    place: str
    parse: Callable[[], str]


def suffix(path: pathlib.Path) -> str:
    """Returns the key of `READERS` for this file; ValueError where there is none."""
    for known in READERS:
        if path.name.endswith(known) and path.is_file():
            return known
    raise ValueError(f"{path}: not a file of a known kind ({', '.join(READERS)}).")


def pieces(path: pathlib.Path) -> list[Piece]:
    """Returns the pieces of a file, in order, of about PIECE_BYTES if it is divided.

    Raises:
      ValueError: of the file's kind there is no reader.
    """
    forms, divide = READERS[suffix(path)]
    try:
        starts = divide(path)
        is_divided = forms == _TEXT and _has_separator(Piece(str(path), ""))
    except _DAMAGE:  # which is told of when the file is read
        starts, is_divided = [0], True
    form = forms[0] if is_divided else forms[-1]
    size = path.stat().st_size // len(starts)
    spans = zip(starts, [*starts[1:], None], strict=True)
    return [Piece(str(path), form, size, start, stop) for start, stop in spans]


class Skipped:
    """Corrupt records: how many, and what was wrong with the first of them."""

    def __init__(self):
        self.count = 0
        self.examples: list[str] = []

    def add(self, complaint: str) -> None:
        """Counts a record, so that it is left out."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(complaint)


def refuse(_: Skipped, complaint: str) -> None:
    """Raises ValueError."""
    raise ValueError(
        f"{complaint} To leave out what is corrupt, set data.on_corrupt=skip."
    )


# What a corrupt record leads to.
POLICIES: dict[str, Callable[[Skipped, str], None]] = {
    "refuse": refuse,
    "skip": Skipped.add,
}


def documents(
    piece: Piece,
    text_field: str,
    policy: str = "refuse",
    skipped: Skipped | None = None,
) -> Iterator[str]:
    """Yields the documents of a piece, in order, without the blank ones.

    Args:
      policy: a key of POLICIES, for bytes that aren't UTF-8, a record without text in
        `text_field`, and a damaged file, of which the rest of the piece is one record.
      skipped: counts what is left out.

    Raises:
      ValueError: what is corrupt, by file and place, where it is refused; or the file
        has no such column.
    """
    complain = functools.partial(POLICIES[policy], skipped or Skipped())
    place = "at its beginning"
    try:
        for record in FORMS[piece.form](piece, text_field):
            place = f"at {record.place}"
            try:
                document = record.parse()
            except ValueError as error:
                complain(f"{piece.path}: {error}.")
            else:
                if document.strip():
                    yield document
    except _DAMAGE as error:
        complain(f"{piece.path}: the file is damaged, {place} or after it: {error}.")


def _read_builtin(piece: Piece, _: str) -> Iterator[Record]:
    for number, document in enumerate(builtin.documents(builtin.domains(piece.path))):
        yield Record(f"document {number}", functools.partial(str, document))


def _read_divided(piece: Piece, _: str) -> Iterator[Record]:
    """Yields what is between separators, from the first that begins in the piece."""
    with _open(piece) as file:
        if piece.start:
            file.seek(max(0, piece.start - len(_SEPARATOR)))
        parts = _split(file)
        if piece.start:
            next(parts)  # up to the separator before it
        for offset, part in parts:
            if piece.ends_before(offset):
                return
            parse = functools.partial(_text_between, part, offset)
            yield Record(f"byte offset {offset}", parse)


def _read_passages(piece: Piece, _: str) -> Iterator[Record]:
    """Yields passages that end with a line, or a character if that is very long."""
    with _open(piece) as file:
        offset = _passage_start(file, piece.start)
        end = math.inf if piece.stop is None else _passage_start(file, piece.stop)
        file.seek(offset)
        while offset < end:
            passage = file.read(int(min(PASSAGE_BYTES, end - offset)))
            left = end - offset - len(passage)
            passage += file.readline(int(min(PASSAGE_BYTES, left)))
            passage += _rest_of_character(file)
            if not passage:
                return
            parse = functools.partial(_decode, passage, offset)
            yield Record(f"byte offset {offset}", parse)
            offset += len(passage)


def _read_lines(piece: Piece, field: str) -> Iterator[Record]:
    with _open(piece) as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        offset = file.tell()
        for number, line in enumerate(file, start=1):
            if piece.ends_before(offset):
                return
            place = f"byte offset {offset}" if piece.start else f"line {number}"
            parse = functools.partial(_text_of_line, line, field, place, offset)
            yield Record(place, parse)
            offset += len(line)


def _read_rows(piece: Piece, field: str) -> Iterator[Record]:
    with pyarrow.parquet.ParquetFile(piece.path) as file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{piece.path}: no column {field!r} among {columns}.")
        groups = range(file.num_row_groups)
        sizes = [file.metadata.row_group(group).num_rows for group in groups]
        rows = itertools.count(sum(sizes[: piece.start]))
        batches = file.iter_batches(
            columns=[field], row_groups=groups[piece.start : piece.stop]
        )
        values = (value for batch in batches for value in batch[field].to_pylist())
        for row, value in zip(rows, values, strict=False):
            place = f"row {row}"
            yield Record(place, functools.partial(_checked, value, field, place))


def _read_records(piece: Piece, field: str) -> Iterator[Record]:
    """Yields JSON records where the first is a JSON object, and else plain text."""
    reader = ArrayRecordReader(piece.path)
    total = reader.num_records()
    stop = total if piece.stop is None else piece.stop
    is_json = total > 0 and _is_json_object(reader.read(0, 1)[0])
    for start in range(piece.start, stop, _CHUNK_RECORDS):
        records = reader.read(start, min(start + _CHUNK_RECORDS, stop))
        for number, record in enumerate(records, start):
            place = f"record {number}"
            parse = _text_of_json if is_json else _text_of_record
            yield Record(place, functools.partial(parse, record, field, place))
    reader.close()  # raises what was wrong with a file of which it found no records


def _open(piece: Piece) -> io.BufferedIOBase:
    """Stands behind a byte order mark, which is no text."""
    path = pathlib.Path(piece.path)
    file = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    return file


def _split(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Yields what is between separators from here on, and where in the file it is."""
    rest, offset = b"", file.tell()
    while chunk := file.read(_CHUNK_BYTES):
        *parts, rest = (rest + chunk).split(_SEPARATOR)
        for part in parts:
            yield offset, part
            offset += len(part) + len(_SEPARATOR)
    yield offset, rest


def _passage_start(file: io.BufferedIOBase, near: int) -> int:
    """Returns where the first line, or character of a very long one, begins there."""
    if near == 0:
        return file.tell()
    file.seek(near)
    line = file.readline(PASSAGE_BYTES)
    if line.endswith(b"\n"):
        return near + len(line)
    file.seek(near)
    return near + len(_rest_of_character(file))


def _rest_of_character(file: io.BufferedIOBase) -> bytes:
    """Reads the bytes that follow here and begin no character in UTF-8."""
    rest = b""
    while len(rest) < 3 and (byte := file.read(1)):
        if byte[0] & 0xC0 != 0x80:
            file.seek(-1, io.SEEK_CUR)
            break
        rest += byte
    return rest


def _has_separator(piece: Piece) -> bool:
    seen = b""
    with _open(piece) as file:
        while chunk := file.read(_CHUNK_BYTES):
            seen += chunk
            if _SEPARATOR in seen:
                return True
            seen = seen[1 - len(_SEPARATOR) :]
    return False


def _text_between(part: bytes, offset: int) -> str:
    """Returns the text without the line ends beside separators."""
    return _decode(part, offset).strip("\r\n")


def _text_of_line(line: bytes, field: str, place: str, offset: int) -> str:
    text = _decode(line, offset)
    return _from_json(text, field, place) if text.strip() else ""


def _text_of_json(data: bytes, field: str, place: str) -> str:
    return _from_json(_text_of_record(data, field, place), field, place)


def _text_of_record(data: bytes, _: str, place: str) -> str:
    return _decode(data, 0, f"{place}: ")


def _decode(data: bytes, offset: int, place: str = "") -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ValueError(f"{place}not UTF-8 at byte offset {at}") from error


def _is_json_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def _from_json(text: str, field: str, place: str) -> str:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict) or field not in record:
        raise ValueError(f"{place}: not a JSON object with a field {field!r}")
    return _checked(record[field], field, place)


def _checked(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{place}: {field!r} holds {kind} instead of text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a pair
        raise ValueError(f"{place}: {field!r} holds an unpaired surrogate") from error
    return value


def _divide_bytes(path: pathlib.Path) -> list[int]:
    return list(range(0, path.stat().st_size, PIECE_BYTES))


def _divide_rows(path: pathlib.Path) -> list[int]:
    with pyarrow.parquet.ParquetFile(path) as file:
        return list(range(max(1, file.num_row_groups)))


def _divide_records(path: pathlib.Path) -> list[int]:
    reader = ArrayRecordReader(str(path))
    total, size = reader.num_records(), path.stat().st_size
    reader.close()
    return list(range(0, total, max(1, total * PIECE_BYTES // size))) or [0]


def _whole(_: pathlib.Path) -> list[int]:
    return [0]


FORMS: dict[str, Callable[[Piece, str], Iterator[Record]]] = {
    "builtin": _read_builtin,
    "divided": _read_divided,
    "passages": _read_passages,
    "lines": _read_lines,
    "rows": _read_rows,
    "records": _read_records,
}
_TEXT = ("divided", "passages")  # by whether there are separators

# How a file is read, and where its pieces begin.
READERS: dict[str, tuple[tuple[str, ...], Callable[[pathlib.Path], list[int]]]] = {
    ".txt": (_TEXT, _divide_bytes),
    ".txt.gz": (_TEXT, _whole),
    ".jsonl": (("lines",), _divide_bytes),
    ".jsonl.gz": (("lines",), _whole),
    ".parquet": (("rows",), _divide_rows),
    ".arrayrecord": (("records",), _divide_records),
}
