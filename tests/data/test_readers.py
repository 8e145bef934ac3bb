"""Every file format, and every way in which a file can be wrong."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jmoe.data import readers

DOCUMENTS = ["one fish\ntwo fish", "Grüße, 世界", " red fish "]


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:2")
    for record in records:
        writer.write(record)
    writer.close()


def documents(path, field, *policy):
    """Of all pieces of a file."""
    for piece in readers.pieces(path):
        yield from readers.documents(piece, field, *policy)


def json_lines(documents, field="text"):
    return [json.dumps({field: document}).encode() for document in documents]


def write(path, documents):
    """Writes the documents in the format that the path's name asks for."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)
    elif path.suffix == ".arrayrecord":
        write_records(path, json_lines(documents))
    else:
        separator = b"<|endoftext|>" if ".txt" in path.name else b"\n\n"
        plain = [document.encode() for document in documents]
        lines = plain if ".txt" in path.name else json_lines(documents)
        data = separator.join(lines)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", readers.READERS)
def test_a_file_gives_back_the_documents_written_to_it(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    write(path, [*DOCUMENTS, "  "])
    assert list(documents(path, "text")) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrayrecord"])
def test_a_missing_field_is_named_with_the_file(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    write(path, DOCUMENTS)
    with pytest.raises(ValueError, match=f"file{suffix}.*'body'"):
        list(documents(path, "body"))


def test_plain_records_may_begin_like_json(tmp_path):
    path = tmp_path / "plain.arrayrecord"
    write_records(path, [b"plain text", b'{"text": "still plain"}'])
    found = list(documents(path, "text"))
    assert found == ["plain text", '{"text": "still plain"}']


def test_line_ends_beside_a_separator_belong_to_it(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one\n<|endoftext|>\n two\nlines\n<|endoftext|>\n")
    assert list(documents(path, "")) == ["one", " two\nlines"]


@pytest.mark.parametrize("line", ["a line of the text, ünïcödé\n", "世界ü"])
def test_a_text_without_separators_is_cut_without_losing_anything(tmp_path, line):
    path = tmp_path / "book.txt"
    book = line * (100_000 // len(line))
    path.write_text(book, encoding="utf-8")
    passages = list(documents(path, ""))
    assert "".join(passages) == book
    assert len(passages) > 5
    assert max(map(len, passages)) <= 2 * readers.PASSAGE_BYTES
    if line.endswith("\n"):
        assert all(passage.endswith("\n") for passage in passages)


def test_a_separator_is_found_across_the_border_of_two_reads(tmp_path, monkeypatch):
    path = tmp_path / "stories.txt"
    path.write_text("one<|endoftext|>two")
    for size in range(1, 20):
        monkeypatch.setattr(readers, "_CHUNK_BYTES", size)
        assert list(documents(path, "")) == ["one", "two"]


@pytest.mark.parametrize(
    "name, before",
    [
        ("divided.txt", "é one<|endoftext|>two "),
        ("book.txt", "é one two three "),
        ("long.txt", "ü" * 20_000),
        ("packed.txt.gz", "é one<|endoftext|>two "),
        ("lines.jsonl", '{"text": "é"}\n{"text": "'),
    ],
)
def test_bytes_that_are_not_utf8_are_located(tmp_path, name, before):
    path = tmp_path / name
    data = before.encode() + b'\xff"}'
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    place = f"{name}: not UTF-8 at byte offset {len(before.encode())}"
    with pytest.raises(ValueError, match=place):
        list(documents(path, "text"))


def test_a_character_cut_off_at_the_end_is_located(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes(b"abc" + "世".encode()[:2])
    with pytest.raises(ValueError, match="offset 3"):
        list(documents(path, ""))


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "not JSON"),
        ("[]", "'text'"),
        ('{"text": 3}', "int instead of text"),
        ('{"text": null}', "NoneType instead of text"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_json_line_is_located(tmp_path, line, complaint):
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=f"lines.jsonl: line 3: .*{complaint}"):
        list(documents(path, "text"))


@pytest.mark.parametrize("suffix", [".txt.gz", ".parquet", ".arrayrecord"])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"file{suffix}"
    write(path, [f"{i} {DOCUMENTS}" for i in range(500)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"nonsense")
    with pytest.raises(ValueError, match=f"file{suffix}: the file is damaged"):
        list(documents(path, "text"))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    write(path, DOCUMENTS)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        plain = file.read()
    with opened(path, "wb") as file:
        file.write(b"\xef\xbb\xbf" + plain)
    assert list(documents(path, "text")) == DOCUMENTS
    with opened(path, "wb") as file:
        file.write(b"\xef\xbb\xbf{\xff")
    with pytest.raises(ValueError, match="not UTF-8 at byte offset 4"):
        list(documents(path, "text"))
