"""A run as several processes: what they must agree on, and how they wait."""

import functools
import pathlib
import shutil

import pytest

from jmoe.parallel import process_group, processes
from tests.several_processes import together, without_gloo


def disagreement(*views) -> str:
    errors = together(processes.agree, *views)
    assert {type(error) for error in errors} == {ValueError}
    (text,) = {str(error) for error in errors}
    return text


def test_processes_that_agree_go_on():
    record = {"train": {"seed": 0, "rates": [0.1, 0.2]}, "name": "tiny"}
    assert together(processes.agree, record, record, record) == [None] * 3


def test_a_difference_is_named_with_who_has_what_on_every_process():
    views = [{"train": {"seed": s, "steps": 9}} for s in (0, 1, 0, 0)]
    assert disagreement(*views) == (
        "The processes must agree, but differ in\n"
        "  train.seed: 0 on processes 0, 2-3, 1 on process 1"
    )


@pytest.mark.parametrize(
    ("views", "line"),
    [
        (
            ({"a": [{"path": "x"}]}, {"a": [{"path": "y"}]}),
            'a.0.path: "x" on process 0',
        ),
        (({"a": 1}, {"a": None}), "a: 1 on process 0, null on process 1"),
        (({"a": 1}, {}), "a: 1 on process 0, nothing on process 1"),
        (({"a": []}, {"a": [3]}), "a: [] on process 0, nothing on process 1"),
        (({"a": 1}, {"a": 1.0}), "a: 1 on process 0, 1.0 on process 1"),
        (({"a": 1}, {"a": True}), "a: 1 on process 0, true on process 1"),
    ],
)
def test_whatever_differs_is_shown_as_json(views, line):
    assert f"\n  {line}" in disagreement(*views)


def test_many_differences_are_counted():
    views = [{f"x{i:02}": process for i in range(20)} for process in (0, 1)]
    lines = disagreement(*views).splitlines()
    assert len(lines) == 10 and lines[-1] == "  and 12 more"


def test_code_that_differs_is_named_by_file(tmp_path):
    package = shutil.copytree(
        pathlib.Path(processes.__file__).parent, tmp_path / "jmoe"
    )
    with (package / "zero.py").open("a") as file:
        file.write("# a change\n")
    changed = processes.code_fingerprint(package)
    (package / "zero.py").write_text("")
    text = disagreement(
        {"code": processes.code_fingerprint(package)}, {"code": changed}
    )
    assert text.count("\n") == 1 and "\n  code.jmoe/zero.py: " in text


def test_the_fingerprint_covers_the_package_and_is_the_same_from_anywhere(tmp_path):
    package = pathlib.Path(processes.__file__).parents[1]
    found = processes.code_fingerprint()
    assert {"jmoe/__init__.py", "jmoe/train/step.py"} <= set(found)
    assert found == processes.code_fingerprint(
        shutil.copytree(package, tmp_path / "jmoe")
    )


def test_an_error_ends_all_processes_with_its_text():
    def work(index: int):
        if index == 1:
            raise FileNotFoundError("No file matches 'x'.")
        processes.exchange("data", index)

    errors = together(work, 0, 1, 2)
    assert str(errors[1]) == "No file matches 'x'."
    assert [str(errors[i]) for i in (0, 2)] == ["process 1: No file matches 'x'."] * 2


def test_process_0_goes_first_and_its_value_counts():
    order = []

    def work(index: int):
        with processes.first_before_others("data"):
            order.append(index)
        return processes.from_first("step", lambda: 10 * processes.index())

    assert together(work, 0, 1, 2) == [0, 0, 0]
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_a_signal_of_one_process_is_known_to_all():
    asked = functools.partial(processes.any_signal, ask=True)
    assert together(asked, 0, 15, 0) == [15] * 3
    assert together(asked, 0, 0, 0) == [0] * 3


def test_between_asks_nothing_travels_and_no_process_stops(monkeypatch):
    exchanged = []

    def count(group, what, value):
        exchanged.append(value)
        return exchange(group, what, value)

    exchange = process_group.ProcessGroup.exchange
    monkeypatch.setattr(process_group.ProcessGroup, "exchange", count)

    def run(mine: int) -> int:
        """The step after which a process stops that got a signal in the third."""
        for step in range(1, 30):
            signal = mine if step >= 3 else 0
            if processes.any_signal(signal, ask=step % 5 == 0):
                return step
        return 0

    assert together(run, 0, 15, 0) == [5] * 3
    assert sorted(exchanged) == [0, 0, 15]


def test_a_lone_process_agrees_with_itself_and_waits_for_nobody():
    with processes.join():
        processes.agree({"seed": 0})
        with processes.first_before_others("data"):
            pass
        assert processes.from_first("step", lambda: 7) == 7
        assert processes.any_signal(15, ask=False) == 15
        assert processes.index() == 0


RANK = "[Gloo] Rank 1 is connected to 1 peer ranks. "
RANKS = "Expected number of connected peer ranks is : 1"


@pytest.mark.parametrize(
    ("out", "ours"),
    [
        (f"\na\n{RANK}{RANKS}\n\n7\n", "\na\n\n7\n"),
        (f"{RANK}{RANK}{RANKS}\n{RANKS}\na\n", "a\n"),
        (f"{RANK}{RANK}{RANKS}{RANKS}\n\n\na\n", "\na\n"),
        (f"{RANK}[Gloo] Rank {RANKS}\n1 is connected to 1 peer ranks. \na\n", "a\n"),
        (f"{RANK}{RANK}{RANKS}{RANKS[:-1]}\n1\n1\n", "1\n"),
    ],
)
def test_gloos_messages_are_no_output_of_a_process_however_mixed(out, ours):
    assert without_gloo(out) == ours
