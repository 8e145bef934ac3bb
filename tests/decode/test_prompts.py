"""Files of prompts: what is read, and which line is named if it can't be."""

import json

import pytest

from jmoe.decode.prompts import read_prompts


def test_each_line_that_is_not_blank_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("The square\r\n\n  \n größer\n".encode())
    found = read_prompts(path)
    assert [(x.line, x.text) for x in found] == [(1, "The square"), (4, " größer")]
    assert found[0].record == {"prompt": "The square"}


def test_each_object_keeps_its_other_fields(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": 7, "prompt": "a\nb"}, {"prompt": "", "id": 8}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(path)
    assert [x.text for x in found] == ["a\nb", ""]
    assert [x.record for x in found] == rows


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "a.txt' holds no prompt"),
        ("a.jsonl", b"\n\n", "a.jsonl' holds no prompt"),
        ("a.txt", b"good\nb\xff\n", "a.txt', line 2: It must be UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prom', "line 2: It must be a JSON object"),
        ("a.jsonl", b'["a"]', "line 1: It must be a JSON object"),
        ("a.jsonl", b'\n{"text": "a"}', "line 2: .* no field 'prompt'; it has text"),
        ("a.jsonl", b"{}", "line 1: It has no field 'prompt'; it has none"),
        ("a.jsonl", b'{"prompt": "a", "b": "\\ud800"}', "line 1: .*surrogate"),
        ("a.jsonl", b'{"prompt": 3}', "line 1: prompt=3 must be a text"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_prompts(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt' is not a file"):
        read_prompts(tmp_path / "nowhere.txt")
