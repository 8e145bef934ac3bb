"""A run's starts are all kept, each with the code that it ran."""

import json
import subprocess

import pytest

from jmoe.monitor import run_files, starts


def git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", root, *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_start_is_added_to_those_before_it(tmp_path):
    for parameters in (1, 2):
        starts.add_start(tmp_path, parameters=parameters)
    found = json.loads((tmp_path / "run.json").read_text())
    assert [start["parameters"] for start in found] == [1, 2]
    assert found[1].keys() >= {"command", "started", "commit", "dirty", "versions"}
    assert run_files.read_run(tmp_path).info == found[1]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_start_of_a_run_from_before_is_kept(tmp_path):
    (tmp_path / "run.json").write_text('{"parameters": 1}')
    starts.add_start(tmp_path, parameters=2)
    found = run_files.read_starts(tmp_path / "run.json")
    assert [start["parameters"] for start in found] == [1, 2]


def record(**other) -> dict:
    versions = {"python": "3.11.9", "jax": "0.10.2"} | other.pop("versions", {})
    start = {"commit": "a" * 40, "dirty": False, "code": "0a", "device": "CPU, 2 cores"}
    return start | {"processes": 1, "versions": versions} | other


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({}, "nothing has changed"),
        ({"command": "train", "started": "later"}, "nothing has changed"),
        ({"commit": "b" * 40}, "commit aaaaaaaaa -> bbbbbbbbb"),
        (
            {"dirty": True, "code": "1b"},
            "commit aaaaaaaaa -> aaaaaaaaa with changes; code 0a -> 1b",
        ),
        ({"code": "1b"}, "code 0a -> 1b"),
        ({"versions": {"jax": "0.12.0"}}, "jax 0.10.2 -> 0.12.0"),
        (
            {"device": "2 x CPU: data=2", "processes": 2},
            "device CPU, 2 cores -> 2 x CPU: data=2; processes 1 -> 2",
        ),
    ],
    ids=str,
)
def test_a_line_says_what_has_changed_since_the_start_before(other, line):
    start = starts.Start(record(**other), record())
    assert starts.since(start, {}) == f"Since the last start: {line}."


def test_fields_that_changed_are_in_the_line_and_many_are_cut_short():
    start = starts.Start(record(), record())
    fields = {"train.steps": (40, 60), "optimizer.name": ("adamw", "muon")}
    assert starts.since(start, fields) == (
        "Since the last start: train.steps 40 -> 60; optimizer.name 'adamw' -> 'muon'."
    )
    line = starts.since(start, {f"train.field{i}": (0, 1) for i in range(20)})
    assert line.endswith("train.field11 0 -> 1; and 8 more, see config.json.")


def test_the_first_start_has_none_before_it_and_older_records_tell_less(tmp_path):
    first = starts.add_start(tmp_path, device="CPU, 2 cores")
    assert starts.since(first, {"train.steps": (1, 2)}) is None
    again = starts.add_start(tmp_path, device="CPU, 2 cores")
    assert starts.since(again, {}) == "Since the last start: nothing has changed."
    older = again._replace(before={"parameters": 1, "versions": {"jax": "0.0.1"}})
    jax = again.now["versions"]["jax"]
    assert starts.since(older, {}) == f"Since the last start: jax 0.0.1 -> {jax}."


def test_an_edit_of_the_source_is_another_code(tmp_path, monkeypatch):
    (first,) = {starts.add_start(tmp_path).now["code"] for _ in range(2)}
    monkeypatch.setattr(starts.processes, "code_fingerprint", lambda: {"a.py": "1"})
    assert starts.add_start(tmp_path).now["code"] != first


def test_the_code_is_the_commit_and_whether_files_differ_from_it(tmp_path):
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "--message=first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert starts.commit(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "new.py").write_text("")
    assert starts.commit(tmp_path) == {"commit": commit, "dirty": True}


def test_an_installed_package_has_no_commit_of_the_clone_around_it(tmp_path):
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "--message=theirs")
    (tmp_path / "site-packages").mkdir()
    assert starts.commit(tmp_path / "site-packages") == {"commit": None, "dirty": None}
