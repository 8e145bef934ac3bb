"""A file's digest is that of its content, whenever it changed and whatever is kept."""

import hashlib
import logging
import os
import time

import pytest

from jmoe.data import digests


def of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that are read, while files settle at once."""
    names, read_file = [], digests._read

    def reading(path):
        names.append(path.name)
        return read_file(path)

    monkeypatch.setattr(digests, "_read", reading)
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    digests._remembered.cache_clear()
    return names


@pytest.fixture
def next_start():
    """Forgets what a process knows."""
    return digests._remembered.cache_clear


def test_a_file_is_read_at_the_first_start_only(tmp_path, read, next_start):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    for _ in range(3):
        for name in ("a", "b", "a"):
            path, cache = tmp_path / name, tmp_path / "cache"
            assert digests.sha256(path, cache) == of(name.encode())
        next_start()
    assert read == ["a", "b"]
    digests.sha256(tmp_path / "a", tmp_path / "another cache")
    assert read == ["a", "b", "a"]


@pytest.mark.parametrize("change", ["written", "replaced", "lengthened"])
def test_a_file_that_changed_is_read_again(tmp_path, read, next_start, change):
    path, times = tmp_path / "a", (10**9, 10**9)
    path.write_bytes(b"one")
    os.utime(path, times)
    assert digests.sha256(path, tmp_path / "cache") == of(b"one")
    time.sleep(0.05)  # more than a tick of the file system's clock
    if change == "replaced":
        (tmp_path / "b").write_bytes(b"two")
        (tmp_path / "b").replace(path)
    else:
        path.write_bytes(b"two" if change == "written" else b"one more")
    os.utime(path, times)  # as `cp -p` would
    next_start()
    assert digests.sha256(path, tmp_path / "cache") == of(path.read_bytes()) != of(b"1")
    assert read == ["a", "a"]


def test_what_is_written_twice_within_one_tick_is_not_mistaken(tmp_path, monkeypatch):
    path, stamp = tmp_path / "a", digests._stamp
    hour_ns = 3600 * 10**9

    def coarse(path):
        exact = stamp(path)
        now_ns = exact.ctime_ns // hour_ns * hour_ns
        return exact._replace(mtime_ns=now_ns, ctime_ns=now_ns)

    monkeypatch.setattr(digests, "_stamp", coarse)
    monkeypatch.setattr(digests, "_SETTLED_NS", 2 * hour_ns)
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert digests.sha256(path, tmp_path / "cache") == of(content)


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, read, monkeypatch):
    path, read_file = tmp_path / "a", digests._read
    path.write_bytes(b"one")

    def reading(path):
        digest = read_file(path)
        path.write_bytes(b"longer")
        return digest

    monkeypatch.setattr(digests, "_read", reading)
    digests.sha256(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_was_kept_and_then_damaged_is_made_anew(tmp_path, read, next_start):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    digests.sha256(path, tmp_path / "cache")
    (entry,) = (tmp_path / "cache" / "digests").iterdir()
    kept = entry.read_bytes()
    damaged = [kept[:at] for at in range(len(kept))]
    for at in range(len(kept)):
        damaged.append(kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :])
    for content in [
        *damaged,
        b"[]",
        b"{}",
        b"null",
        kept.replace(of(b"one").encode(), b"0"),
    ]:
        entry.write_bytes(content)
        next_start()
        assert digests.sha256(path, tmp_path / "cache") == of(b"one")
    assert entry.read_bytes() == kept and len(read) > len(damaged)


def test_where_nothing_can_be_kept_a_warning_says_so(tmp_path, read, caplog):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert digests.sha256(path, tmp_path / "file") == of(b"one")
    assert len(caplog.records) == 1 and "read again" in caplog.text
    assert read == ["a"]
