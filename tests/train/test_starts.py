"""A run's starts are all kept, each with the code that it ran."""

import json
import subprocess

from jmoe.train import run_files, starts


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
