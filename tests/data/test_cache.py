"""The cache: whole results or none, however many processes make them."""

import concurrent.futures
import os
import pathlib
import threading

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
