"""Accuracy on problems: what is asked, how it is counted, how sure it is."""

import collections
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.decode.requests import Sampling
from jmoe.evals import math500
from jmoe.evals.completions import Reply
from tests.evals.conftest import PROBLEMS

GREEDY = Sampling()
DRAWN = Sampling(temperature=0.7, seed=2**32 - 3)


@pytest.fixture
def problems(problems_file):
    return math500.read_problems(problems_file)


def solve(problems, complete, judge, sampling=GREEDY, **options):
    asked = math500.plan(problems, sampling, **options)
    return list(math500.evaluate(asked, complete, judge))


def test_right_answers_to_all_problems_are_100_percent(problems, solving, judge):
    samples = solve(problems, solving(), judge)
    score = math500.score(samples)
    assert (score.total.accuracy, score.total.problems) == (1.0, len(PROBLEMS))
    assert score.pass_at_k == 1.0
    assert score.unfinished == score.without_answer == score.errors == 0


def test_wrong_answers_count_where_they_were_given(problems, solving, judge):
    wrong = {
        PROBLEMS[0]["problem"]: "It is \\boxed{2}.",
        PROBLEMS[2]["problem"]: "I don't know.",
    }
    score = math500.score(solve(problems, solving(wrong), judge))
    by_level = {name: row[0::3] for name, row in score.by_level.items()}
    assert by_level == {"1": (0.5, 2), "2": (0.5, 2), "3": (1.0, 1)}
    assert score.by_subject["Algebra"].accuracy == pytest.approx(2 / 3)
    assert score.by_subject["Prealgebra"].accuracy == 0.5
    assert (score.total.accuracy, score.without_answer) == (0.6, 1)


def test_the_prompt_is_the_problem_and_deepseeks_directive(problems):
    first, *_ = math500.plan(problems, Sampling())
    problem, directive, end = first.prompted.text.split("\n")
    assert (problem, end) == (PROBLEMS[0]["problem"], "")
    assert directive == (
        "Please reason step by step, and put your final answer within \\boxed{}."
    )
    first, *_ = math500.plan(problems, Sampling(), prompt=math500.message)
    assert first.prompted.text == f"{problem}\n{directive}"


def test_each_sample_has_a_seed_of_its_own_whatever_else_is_asked(problems):
    seeds = {
        asked.key: asked.prompted.sampling.seed
        for asked in math500.plan(problems, DRAWN, 4)
    }
    assert len(set(seeds.values())) == 4 * len(problems)
    fewer = math500.plan(problems[:3], DRAWN, 2)
    assert len(fewer) == 6
    assert all(seeds[asked.key] == asked.prompted.sampling.seed for asked in fewer)


def test_of_several_samples_the_mean_counts_and_one_is_enough_to_pass(problems, judge):
    def every_other(prompts):
        for number in range(len(prompts)):
            text = "\\boxed{1/4}" if number % 2 else "\\boxed{1/5}"
            yield Reply(number, text, "length")

    samples = solve(problems[:1], every_other, judge, DRAWN, num_samples=4)
    score = math500.score(samples)
    assert (score.total.accuracy, score.total.problems) == (0.5, 1)
    assert (score.pass_at_k, score.samples, score.unfinished) == (1.0, 4, 4)


def test_what_is_known_is_not_asked_again(problems, solving, judge):
    asked = math500.plan(problems, DRAWN, 2)
    known = list(math500.evaluate(asked[:3], solving(), judge))
    other = known[0]._replace(name="of another evaluation")
    samples, left = math500.split(asked, [other, *known])
    assert sorted(samples) == sorted(known)
    assert left == asked[3:]


@given(st.integers(1, 500), st.data())
def test_an_interval_holds_the_accuracy_and_shrinks(count, data):
    accuracy = data.draw(st.integers(0, count)) / count
    low, high = math500.wilson(accuracy, count)
    assert 0 <= low <= accuracy <= high <= 1
    narrow_low, narrow_high = math500.wilson(accuracy, 4 * count)
    assert narrow_high - narrow_low < high - low


def test_intervals_are_wilsons():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263, 15/148, 0/20, 1/29.
    table = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0000, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, count), interval in table.items():
        got = math500.wilson(right / count, count)
        assert got == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("field", math500.FIELDS)
def test_a_missing_field_is_named(tmp_path, field):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({k: v for k, v in PROBLEMS[0].items() if k != field}))
    with pytest.raises(ValueError, match=f"line 1: no field {field}"):
        math500.read_problems(path)


def test_two_problems_of_one_name_are_refused(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text((json.dumps({**PROBLEMS[0], "unique_id": "a"}) + "\n") * 2)
    with pytest.raises(ValueError, match="2 problems have unique_id='a'"):
        math500.read_problems(path)


@pytest.mark.parametrize(
    ("num_samples", "complaint"),
    [(0, "samples=0 must be at least 1"), (2, "with temperature=0 are all the same")],
)
def test_samples_that_say_nothing_are_refused(problems, num_samples, complaint):
    with pytest.raises(ValueError, match=complaint):
        math500.plan(problems, Sampling(), num_samples)


def test_a_prompt_that_was_refused_is_wrong_and_says_why(problems, judge):
    def refusing(prompts):
        reasons = ["no", "too long", "too long"]
        for number, reason in enumerate(reasons):
            yield Reply(number, "", "error", reason)
        yield Reply(3, PROBLEMS[3]["solution"], "stop")

    score = math500.score(solve(problems[:4], refusing, judge))
    assert (score.total.accuracy, score.errors, score.error) == (0.25, 3, "too long")


def test_without_samples_there_is_no_score():
    with pytest.raises(ValueError, match="no samples"):
        math500.score([])


def test_the_problems_of_this_file_are_of_several_kinds():
    assert len(collections.Counter(p["subject"] for p in PROBLEMS)) > 1
