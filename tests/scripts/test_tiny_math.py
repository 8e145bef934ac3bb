"""experiments/tiny_math.py: its problems are right, and those held out are unseen."""

import importlib
import itertools
import json
import re

import pytest

from jmoe.evals import math500
from jmoe.evals.judge import boxed

STEP = re.compile(r"(?<!\d)(\d[\d+*/-]*)=(?=(\d+))")


@pytest.fixture(scope="module")
def tiny_math(without_flags):
    """The module, without its flags: other programs have some of these names."""
    with without_flags():
        return importlib.import_module("experiments.tiny_math")


@pytest.fixture(scope="module")
def records(tiny_math):
    return list(itertools.islice(tiny_math.problems(seed=1), 3000))


@pytest.fixture
def written(tiny_math, tmp_path, monkeypatch):
    """The two files of a small training text."""
    monkeypatch.setattr(tiny_math, "NUM_TRAINED", 3000)
    held_out = tiny_math.write_problems(tmp_path)
    lines = (tmp_path / tiny_math.TEXT).read_text().splitlines()
    return held_out, [json.loads(line)["text"] for line in lines]


def test_every_step_of_a_solution_is_right(records):
    checked = 0
    for record in records:
        for left, right in STEP.findall(record["solution"]):
            assert eval(left) == int(right), record
            checked += 1
    assert checked > 1.5 * len(records)


def test_the_steps_lead_to_the_answer(records):
    for record in records:
        *results, last = (int(right) for _, right in STEP.findall(record["solution"]))
        units = "".join(str(result % 10) for result in reversed(results))
        by_digits = record["subject"] in ("Addition", "Subtraction")
        want = f"{last}{units}" if by_digits else last
        assert int(record["answer"]) == int(want), record


def test_answers_are_those_of_the_problems(records):
    for record in records:
        numbers = [*map(int, re.findall(r"\d+", record["problem"]))]
        want = {
            "Addition": lambda a, b: a + b,
            "Subtraction": lambda a, b: a - b,
            "Multiplication": lambda a, b: a * b,
            "Sequences": lambda a, b, c: c + b - a,
            "Equations": lambda a, *b, c=numbers[-1]: (c - sum(b[:-1])) // a,
        }[record["subject"]](*numbers)
        assert record["answer"] == str(want) == boxed(record["solution"])
        assert want >= 0


def test_problems_held_out_are_never_trained_on(tiny_math, written):
    held_out, texts = written
    trained = {text.splitlines()[0] for text in texts}
    assert len(held_out) > 50 and len(trained) > 1000
    assert {problem.problem for problem in held_out}.isdisjoint(trained)
    assert all(not tiny_math.is_held_out(problem) for problem in trained)


def test_a_model_is_asked_as_its_text_began(tiny_math, written):
    held_out, texts = written
    (asked,) = math500.plan(held_out[:1], tiny_math.SAMPLING)
    ending = asked.prompted.text.removeprefix(held_out[0].problem)
    assert len(ending) > 50
    assert all(text.count(ending) == 1 for text in texts)


def test_files_that_are_there_stay(tiny_math, written, tmp_path):
    before = (tmp_path / tiny_math.TEXT).stat().st_mtime_ns
    assert tiny_math.write_problems(tmp_path) == written[0]
    assert (tmp_path / tiny_math.TEXT).stat().st_mtime_ns == before


def test_what_was_found_is_drawn_and_told(tiny_math, tmp_path):
    row = math500.Accuracy(0.5, 0.4, 0.6, 100)
    kinds = dict.fromkeys(sorted(tiny_math.KINDS), row)
    score = math500.Score(row, {"1": row}, kinds, 0.5, 100, 0, 0, 0, 0, "")
    scores = {0: score, 10: score, 20: score}
    tiny_math.draw(scores, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads(json.dumps(tiny_math.figures_of(scores)))
    assert figures["before"] == figures["after"] == 0.5
    assert list(figures["by_step"]) == ["0", "10", "20"]
