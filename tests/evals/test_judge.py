"""Right answers count in any form, wrong ones in none, and nothing stops the judge."""

import concurrent.futures
import threading
import time

import pytest

from jmoe.evals import judge as judging
from jmoe.evals.judge import Judge, Verdict, boxed
from tests.evals.conftest import PROBLEMS

FORMS = [
    ("\\frac{1}{4}", ["1/4", "0.25", "\\dfrac14", "\\frac{2}{8}", "x = \\tfrac 14"]),
    ("-3,3", ["3, -3", "\\{-3, 3\\}", "x=-3,3", "\\pm 3"]),
    ("(x-1)(x+1)", ["x^2-1", "(1+x)(x-1)", "-(1-x^2)"]),
    ("\\text{Monday}", ["Monday", "\\textbf{Monday}", "\\text{ Monday }"]),
    ("(0,\\infty)", ["(0, \\infty)", "\\left(0,\\infty\\right)"]),
    ("90^\\circ", ["90", "90^{\\circ}"]),
    ("11,\\!111,\\!100", ["11111100", "11,111,100"]),
    ("2\\sqrt{3}", ["\\sqrt{12}", "2 \\cdot 3^{1/2}"]),
]
OTHERS = [
    ("\\frac{1}{4}", ["4", "\\frac{1}{5}", "-\\frac14", "0.2", "\\frac14 + 1"]),
    ("-3,3", ["3", "-3", "-3,4", "(3, 3)"]),
    ("(x-1)(x+1)", ["x^2+1", "(x-1)^2", "(y-1)(y+1)"]),
    ("\\text{Monday}", ["\\text{Tuesday}", "Sunday", "1"]),
    ("(0,\\infty)", ["[0,\\infty)", "(-\\infty,0)", "0"]),
]
HARD = "10^{10^{10}}!"  # is computed for hours
HOPELESS = ["", "\\frac{}{}", "}{", "\\", "\0", "\ud800", "(" * 100, "\\begin{", "日本"]


def in_a_box(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize("record", PROBLEMS, ids=lambda record: record["answer"])
def test_a_gold_answer_is_right(judge, record):
    assert judge(record["answer"], record["solution"]).is_correct
    assert judge(record["answer"], in_a_box(record["answer"])).is_correct


@pytest.mark.parametrize(("gold", "forms"), FORMS)
def test_equivalent_forms_count(judge, gold, forms):
    assert [form for form in forms if not judge(gold, in_a_box(form)).is_correct] == []


@pytest.mark.parametrize(("gold", "others"), OTHERS)
def test_other_answers_do_not_count(judge, gold, others):
    assert [other for other in others if judge(gold, in_a_box(other)).is_correct] == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("first \\boxed{1}, then \\boxed{2}.", "2"),
        ("\\boxed{\\frac{1}{2}} and {more}", "\\frac{1}{2}"),
        ("\\boxed{ \\{1, 2\\} }", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("the answer is 4", None),
        ("\\boxed{1}, no: \\boxed{2", None),
        ("\\boxed 3", None),
        ("", None),
    ],
)
def test_the_answer_is_what_the_last_box_holds(text, answer):
    assert boxed(text) == answer


def test_without_a_box_there_is_no_answer(judge):
    assert judge("4", "It is 4.") == Verdict(None, False, "no answer in a box")


@pytest.mark.parametrize("nonsense", HOPELESS, ids=ascii)
def test_nonsense_is_wrong_and_stops_nothing(judge, nonsense):
    assert not judge("4", in_a_box(nonsense)).is_correct
    assert not judge(nonsense, in_a_box("4")).is_correct
    assert judge("4", in_a_box("2^2")).is_correct


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_is_judged():
    with Judge(seconds=60) as judge:
        assert judge("4", in_a_box("4")).is_correct
        judge._seconds = 1
        start = time.monotonic()
        got = judge("4", in_a_box(HARD))
        assert got == Verdict(HARD, False, "judging took too long")
        assert time.monotonic() - start < 30
        judge._seconds = 60
        assert judge("4", in_a_box("4")).is_correct


def test_a_worker_that_died_between_answers_is_replaced(judge):
    assert judge("4", in_a_box("4")).is_correct
    judge._worker.kill()
    judge._worker.wait()
    assert judge("4", in_a_box("4")).is_correct


def test_a_worker_that_dies_over_an_answer_is_replaced(judge):
    assert judge("4", in_a_box("4")).is_correct
    killing = threading.Timer(0.5, judge._worker.kill)
    killing.start()
    assert judge("4", in_a_box(HARD)) == Verdict(HARD, False, "judging died")
    killing.join()
    assert judge("4", in_a_box("4")).is_correct


def test_an_answer_is_never_run_as_code(judge, tmp_path):
    made = tmp_path / "made"
    code = f"__import__('pathlib').Path('{made}').touch()"
    for text in (
        code,
        f"\\text{{{code}}}",
        f"x = {code}",
        f"{{{code}, 1}}",
        f"$ {code} $",
    ):
        assert not judge("1", in_a_box(text)).is_correct
        judge(text, in_a_box(text))
    assert not made.exists()


def test_threads_share_a_judge(judge):
    answers = [str(number) for number in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda a: judge(a, in_a_box(a)), answers))
    assert [verdict.answer for verdict in found] == answers
    assert all(verdict.is_correct for verdict in found)


def test_a_very_long_answer_is_not_even_tried(judge):
    got = judge("1", in_a_box("1" * 5000))
    assert (got.is_correct, got.failure) == (False, "too long an answer")


def test_without_the_library_it_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(judging.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jmoe\[eval\]'"):
        Judge()
