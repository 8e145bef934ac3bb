"""File formats: the documents in a file, read in bounded memory.

In .jsonl, .parquet and .arrayrecord files each record is a document. A .txt file with
`<|endoftext|>` in it is divided there; one without is a long text, cut at line ends
into passages of about 8 KiB, so that some can validate what others train.
"""

import codecs
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordReader

SEPARATOR = "<|endoftext|>"
PASSAGE_BYTES = 8 * 1024
_CHUNK_BYTES = 1024 * 1024
_CHUNK_RECORDS = 1024

# What the libraries raise for a file that was cut short or overwritten;
# ArrayRecord has only RuntimeError.
_DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, RuntimeError)
_DAMAGE += (pyarrow.ArrowException, UnicodeDecodeError)


def suffix(path: pathlib.Path) -> str:
    """The key of `READERS` for this file; ValueError where there is none."""
    for known in READERS:
        if path.name.endswith(known) and path.is_file():
            return known
    raise ValueError(f"{path}: not a file of a known kind ({', '.join(READERS)}).")


def documents(path: pathlib.Path, text_field: str) -> Iterator[str]:
    """The documents of one file, in order, without the blank ones.

    Raises:
      ValueError: naming the file and the place in it, for bytes that aren't UTF-8, a
        record without text in `text_field`, a damaged file, or one without any text.
    """
    holds_text = False
    try:
        for document in READERS[suffix(path)](path, text_field):
            if document.strip():
                holds_text = True
                yield document
    except _DAMAGE as error:
        raise ValueError(f"{path}: the file is damaged: {error}.") from error
    if not holds_text:
        raise ValueError(f"{path}: the file holds no text.")


def _read_txt(path: pathlib.Path, _: str) -> Iterator[str]:
    with _open(path) as file:
        split = _divide if _contains(file, SEPARATOR.encode()) else _cut
    with _open(path) as file:
        yield from split(file, path)


def _read_jsonl(path: pathlib.Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        offset = file.tell()
        for number, line in enumerate(file, start=1):
            text = _decode(line, f"{path}", offset)
            if text.strip():
                yield _from_json(text, field, f"{path}:{number}")
            offset += len(line)


def _read_parquet(path: pathlib.Path, field: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{path}: no column {field!r} among {columns}.")
        batches = file.iter_batches(columns=[field])
        values = (value for batch in batches for value in batch[field].to_pylist())
        for row, value in enumerate(values):
            yield _checked(value, field, f"{path}: row {row}")


def _read_arrayrecord(path: pathlib.Path, field: str) -> Iterator[str]:
    """JSON records where the first one is a JSON object, and else plain text."""
    reader = ArrayRecordReader(str(path))
    total, is_json = reader.num_records(), False
    for start in range(0, total, _CHUNK_RECORDS):
        records = reader.read(start, min(start + _CHUNK_RECORDS, total))
        for number, record in enumerate(records, start):
            where = f"{path}: record {number}"
            text = _decode(record, where, 0)
            if number == 0:
                is_json = _is_json_object(text)
            yield _from_json(text, field, where) if is_json else text
    reader.close()  # raises what was wrong with a file of which it found no records


def _open(path: pathlib.Path) -> io.BufferedIOBase:
    """Stands behind a byte order mark, which is no text."""
    file = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    return file


def _contains(file: io.BufferedIOBase, mark: bytes) -> bool:
    seen = b""
    while chunk := file.read(_CHUNK_BYTES):
        seen += chunk
        if mark in seen:
            return True
        seen = seen[1 - len(mark) :]
    return False


def _divide(file: io.BufferedIOBase, path: pathlib.Path) -> Iterator[str]:
    """The text between separators, without the line ends beside them."""
    separator = SEPARATOR.encode()
    rest, offset = b"", file.tell()
    while chunk := file.read(_CHUNK_BYTES):
        *parts, rest = (rest + chunk).split(separator)
        for part in parts:
            yield _decode(part, f"{path}", offset).strip("\r\n")
            offset += len(part) + len(separator)
    yield _decode(rest, f"{path}", offset).strip("\r\n")


def _cut(file: io.BufferedIOBase, path: pathlib.Path) -> Iterator[str]:
    """Passages that end with a line, or inside it where it is very long."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, passage = file.tell(), None
    while passage != b"":
        passage = file.read(PASSAGE_BYTES) + file.readline(PASSAGE_BYTES)
        # A character may straddle two passages: the decoder keeps its first bytes.
        kept = len(decoder.getstate()[0])
        try:
            yield decoder.decode(passage, final=not passage)
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}", offset - kept + error.start) from error
        offset += len(passage)


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, offset + error.start) from error


def _not_utf8(where: str, offset: int) -> ValueError:
    return ValueError(f"{where}: not UTF-8 at byte offset {offset}.")


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _from_json(text: str, field: str, where: str) -> str:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}.") from error
    if not isinstance(record, dict) or field not in record:
        raise ValueError(f"{where}: not a JSON object with a field {field!r}.")
    return _checked(record[field], field, where)


def _checked(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{where}: {field!r} holds {kind} instead of text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a pair
        raise ValueError(f"{where}: {field!r} holds an unpaired surrogate.") from error
    return value


READERS = {
    ".txt": _read_txt,
    ".txt.gz": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrayrecord": _read_arrayrecord,
}
