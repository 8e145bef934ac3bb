"""Answers in a file: each is there at once, and a rerun goes on with what there is."""

import json

import pytest

from jmoe.evals.math500 import Sample
from jmoe.evals.sample_file import SampleFile

SETTINGS = {"model": "tiny", "seed": 0, "stop": ()}


def sample(number):
    return Sample(
        name=f"p{number}",
        subject="Algebra",
        level="1",
        sample=0,
        prompt="What?\n",
        text="Naïve \ud800 \r\n\u2028 \\boxed{1}",
        finish_reason="stop",
        error="",
        gold="1",
        answer="1",
        is_correct=True,
        failure="",
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "below" / "samples.jsonl"


def write(path, *numbers):
    with SampleFile(path, SETTINGS) as file:
        for number in numbers:
            file.append(sample(number))


def test_a_sample_is_in_the_file_at_once_and_readable(path):
    with SampleFile(path, SETTINGS) as file:
        file.append(sample(3))
        header, line = path.read_text().split("\n")[:2]
    assert json.loads(header)["settings"]["model"] == "tiny"
    assert json.loads(line)["name"] == "p3" and "Naïve" in line


def test_a_rerun_knows_what_was_written_and_adds_to_it(path):
    write(path, 1, 2)
    with SampleFile(path, SETTINGS) as file:
        assert [known.name for known in file.known] == ["p1", "p2"]
        file.append(sample(3))
    with SampleFile(path, SETTINGS) as file:
        assert [known.name for known in file.known] == ["p1", "p2", "p3"]


def test_what_a_killed_process_left_of_a_line_is_cut_off(path):
    write(path, 1, 2)
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole), 9):
        path.write_bytes(whole[:length])
        with SampleFile(path, SETTINGS) as file:
            known = len(file.known)
            file.append(sample(7))
        assert known == whole[:length].count(b"\n") - 1
        with SampleFile(path, SETTINGS) as file:
            assert [known.name for known in file.known][known:] == ["p7"]


def test_samples_of_other_settings_are_refused_and_stay(path):
    write(path, 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="samples of seed=0, not 1; name another file"):
        SampleFile(path, {**SETTINGS, "seed": 1})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"notes", b"notes\n", b"[1]\n", b'{"settings": {}}\n{}\n']
)
def test_a_file_of_something_else_is_refused_and_stays(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="isn't a file of samples"):
        SampleFile(path, SETTINGS)
    assert path.read_bytes() == content
