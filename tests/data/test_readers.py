"""Every file format, and every way in which a file can be wrong."""

import gzip
import json

import numpy as np
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
    """Reads the documents of all pieces of a file."""
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


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".arrayrecord"])
@pytest.mark.parametrize("size", [1, 7, 100, 500])
def test_pieces_hold_each_document_once_and_in_order(
    tmp_path, monkeypatch, suffix, size
):
    path = tmp_path / f"file{suffix}"
    write(path, [f"{i} {document}" for i in range(9) for document in DOCUMENTS])
    whole = list(documents(path, "text"))
    monkeypatch.setattr(readers, "PIECE_BYTES", size)
    pieces = readers.pieces(path)
    assert len(pieces) > 1 or suffix == ".parquet"
    assert list(documents(path, "text")) == whole
    assert [pieces[0].start, pieces[-1].stop] == [0, None]


def test_row_groups_are_pieces_and_rows_keep_their_numbers(tmp_path):
    path = tmp_path / "file.parquet"
    table = pyarrow.table({"text": ["a", "b", "c", None, "e"]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    first, second, third = readers.pieces(path)
    assert list(readers.documents(first, "text")) == ["a", "b"]
    assert list(readers.documents(third, "text")) == ["e"]
    with pytest.raises(ValueError, match="file.parquet: row 3: 'text' holds NoneType"):
        list(readers.documents(second, "text"))


@pytest.mark.parametrize("size", [1, 5, 8191, 30_000])
@pytest.mark.parametrize("line", ["a line, ünïcödé\n", "世界üa", "\n"])
def test_pieces_of_a_text_without_separators_lose_nothing(
    tmp_path, monkeypatch, line, size
):
    path = tmp_path / "book.txt"
    book = line * (400 if size < 100 else 90_000 // len(line))
    path.write_text(book, encoding="utf-8")
    monkeypatch.setattr(readers, "PIECE_BYTES", size)
    monkeypatch.setattr(readers, "PASSAGE_BYTES", 50 if size < 100 else 8192)
    found = [
        passage
        for piece in readers.pieces(path)
        for record in readers.FORMS[piece.form](piece, "")
        for passage in [record.parse()]
    ]
    assert "".join(found) == book


GOOD = json.dumps({"text": "good"}).encode()


@pytest.mark.parametrize(
    ("name", "content", "complaint", "kept"),
    [
        ("a.jsonl", [GOOD, b'{"te', GOOD], "a.jsonl: line 2: not JSON", 2),
        ("a.jsonl", [GOOD, b"\xff", GOOD], "not UTF-8 at byte offset 17", 2),
        ("a.jsonl", [GOOD, b'{"text": 3}'], "a.jsonl: line 2: 'text' holds int", 1),
        ("a.jsonl", [GOOD, b"[" * 10**6], "a.jsonl: line 2: not JSON", 1),
        ("a.txt", [b"good<|endoftext|>\xff<|endoftext|>"], "byte offset 17", 1),
        ("a.txt", [b"x" * 20_000 + b"\xff" + b"y" * 20_000], "offset 20000", 2),
    ],
)
def test_corrupt_records_are_skipped_and_counted_where_that_is_the_policy(
    tmp_path, name, content, complaint, kept
):
    path, skipped = tmp_path / name, readers.Skipped()
    path.write_bytes(b"\n".join(content))
    with pytest.raises(ValueError, match=complaint) as error:
        list(documents(path, "text"))
    assert "set data.on_corrupt=skip" in str(error.value)
    assert len(list(documents(path, "text", "skip", skipped))) == kept
    assert skipped.count == 1
    assert str(error.value).startswith(skipped.examples[0])


def test_lines_of_later_pieces_are_named_by_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 20)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + GOOD + b"\n{")
    with pytest.raises(ValueError, match="a.jsonl: byte offset 34: not JSON"):
        list(documents(tmp_path / "a.jsonl", "text"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet", ".arrayrecord"])
def test_of_a_damaged_file_the_documents_before_the_damage_are_kept(tmp_path, suffix):
    path, skipped = tmp_path / f"file{suffix}", readers.Skipped()
    write(path, [f"{i} {np.random.default_rng(i).bytes(99)}" for i in range(900)])
    path.write_bytes(path.read_bytes()[:-3000])
    found = list(documents(path, "text", "skip", skipped))
    assert len(found) < 900
    assert (len(found) > 100) == (suffix == ".jsonl.gz")
    (complaint,) = skipped.examples
    assert complaint.startswith(f"{path}: the file is damaged, at ")


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
