"""The cache: whole results or none, however many processes make them."""

import concurrent.futures
import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from jmoe.config.data import DataConfig
from jmoe.data import cache


def whole(path: pathlib.Path) -> None:
    """Nothing is wrong with it."""


def test_a_failed_making_leaves_nothing(tmp_path):
    def fail(path):
        (path / "half").write_text("half")
        raise ValueError("bad record")

    with pytest.raises(ValueError, match="bad record"):
        cache.made_once(tmp_path / "result", fail, whole)
    assert list(tmp_path.iterdir()) == []


def test_of_several_makers_at_once_the_first_wins_and_all_see_its_result(tmp_path):
    everyone_is_making = threading.Barrier(4)

    def make(path: pathlib.Path):
        (path / "maker").write_text(str(threading.get_ident()))
        everyone_is_making.wait()

    path = tmp_path / "result"

    def read(_):
        return (cache.made_once(path, make, whole) / "maker").read_text()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(read, range(4)))
    assert len(set(seen)) == 1
    assert os.listdir(tmp_path) == ["result"]


def test_what_exists_is_not_made_again(tmp_path):
    cache.made_once(tmp_path / "result", lambda path: None, whole)
    cache.made_once(tmp_path / "result", lambda path: pytest.fail("made twice"), whole)


def test_what_is_damaged_is_made_again_and_leaves_nothing(tmp_path):
    def make(path):
        (path / "text").write_text("whole")

    def flaw(path):
        return None if (path / "text").read_text() == "whole" else "altered"

    path = cache.made_once(tmp_path / "result", make, flaw)
    (path / "text").write_text("half")
    cache.made_once(path, make, flaw)
    assert (path / "text").read_text() == "whole"
    assert os.listdir(tmp_path) == ["result"]


HOLD = """
import pathlib, sys, time
from jmoe.data import cache

def make(directory):
    (directory / "half").write_text("half")
    print("making", flush=True)
    time.sleep(600)

cache.made_once(pathlib.Path(sys.argv[1]), make, lambda path: None)
"""


def making(directory: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in directory.iterdir() if path.name.startswith(".making")]


@pytest.fixture
def start():
    """Starts a process that is making `path`; it doesn't outlive the test."""
    with contextlib.ExitStack() as stack:

        def start_making(path):
            command = [sys.executable, "-c", HOLD, path]
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout.readline() == b"making\n"
            return process

        yield start_making


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_makes_is_not(
    tmp_path, start
):
    dead, living = start(tmp_path / "a"), start(tmp_path / "b")
    dead.kill()
    dead.wait()
    assert len(making(tmp_path)) == 2
    (tmp_path / ".making-file").write_text("by an older version")
    cache.made_once(tmp_path / "c", lambda path: None, whole)
    (left,) = making(tmp_path)
    assert (left / "b" / "half").exists()
    living.kill()
    living.wait()
    cache.made_once(tmp_path / "a", lambda path: None, whole)
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]


def test_parts_stay_for_the_next_attempt_until_all_is_made(tmp_path):
    path = tmp_path / "result"
    with pytest.raises(RuntimeError), cache.partial(path) as parts:
        (parts / "1").write_text("finished")
        raise RuntimeError
    with cache.partial(path) as parts:
        assert (parts / "1").read_text() == "finished"
        cache.made_once(path, lambda made: None, whole)
    assert os.listdir(tmp_path) == ["result"]


def test_one_at_a_time_makes_parts_and_the_others_wait_for_it(tmp_path):
    path, makers = tmp_path / "result", []

    def make(_):
        with cache.partial(path):
            cache.made_once(path, lambda _: makers.append(1) or time.sleep(0.1), whole)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(4)))
    assert makers == [1]
    assert os.listdir(tmp_path) == ["result"]


def test_parts_that_nobody_comes_back_for_are_removed(tmp_path):
    for name in ("old", "held", "new"):
        (tmp_path / f"{name}.partial").mkdir()
    with cache.partial(tmp_path / "held"):
        for name in ("old", "held"):
            (tmp_path / f"{name}.partial" / "1").write_text("finished")
            os.utime(tmp_path / f"{name}.partial", (1, 1))
        cache.made_once(tmp_path / "result", lambda path: None, whole)
        names = {"held.partial", "new.partial", "result"}
        assert set(os.listdir(tmp_path)) == names


def test_keys_tell_parts_apart_that_read_alike_when_joined():
    assert len({cache.key("ab", "c"), cache.key("a", "bc"), cache.key("abc")}) == 3
    assert cache.key(1) != cache.key("1")


def test_the_default_directory_follows_the_desktop_convention(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.directory(DataConfig()) == pathlib.Path("/somewhere/jmoe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory(DataConfig()) == pathlib.Path.home() / ".cache" / "jmoe"


def test_a_user_without_a_home_is_told_what_to_name_instead(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    with pytest.raises(ValueError, match="data.cache_dir or .* XDG_CACHE_HOME"):
        cache.directory(DataConfig())
