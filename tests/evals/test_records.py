"""Files of problems: what is wrong with one is told by its line and its field."""

import pytest

from jmoe.evals.records import read_records


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content)
        return path

    return write


def test_blank_lines_are_no_records(write):
    path = write(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "\xc3\xa9", "b": 2}')
    assert read_records(path, ["a"]) == [{"a": 1}, {"a": "é", "b": 2}]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"a": "x"}\n{"b": "x"}', "line 2: no field a; the fields are b"),
        (b'{"a": "x"}\n{"a": ', "line 2: not JSON"),
        (b'{"a": "x"}\n\n[1]', "line 3: not a JSON object"),
        (b'{"a": "\xff"}', "line 1: not UTF-8 at byte 7"),
        (b'{"a": 3}', "line 1: a=3 must be text"),
        (b'{"a": " "}', "line 1: a=' ' must be text"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_what_is_wrong_is_told_by_line_and_field(write, content, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_records(write(content), ["a"], text=["a"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl': no such file"):
        read_records(tmp_path / "nothing.jsonl", [])
