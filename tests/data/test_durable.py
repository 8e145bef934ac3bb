"""A file or directory is old or new after a power cut, wherever it comes."""

import errno
import os

import pytest

from jmoe.data import durable
from tests.faults import power

OLD, NEW = "old\n" * 100, "nü" * 1000


def text(directory, name="config.json"):
    path = directory / name
    return path.read_text(encoding="utf-8") if path.exists() else None


@pytest.fixture
def disk(tmp_path):
    """(a disk that watches it, a directory with an old file)."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "config.json").write_text(OLD)
    with power.Disk(root) as disk:
        yield disk, root


def left(disk, tmp_path):
    """The images of a disk, each as a directory, and what it was promised to hold."""
    for count, image in enumerate(disk.images):
        image.restore(tmp_path / str(count))
        yield tmp_path / str(count), image.promised


def test_a_file_is_old_or_new_and_new_once_it_was_written(disk, tmp_path):
    disk, root = disk
    durable.write_text(root / "config.json", NEW)
    disk.promise(NEW)
    found = [(text(image), promised) for image, promised in left(disk, tmp_path)]
    assert {OLD, NEW} == {content for content, _ in found}
    assert {content for content, promised in found if promised} == {NEW}


def test_a_file_is_synced_before_its_name_and_its_directory_after(disk):
    disk, root = disk
    durable.write_text(root / "config.json", NEW)
    unfinished = ".config.json.tmp"
    assert disk.calls == [
        ("fsync", unfinished),
        ("replace", unfinished, "config.json"),
        ("fsync", "."),
    ]


def test_a_new_directory_outlives_a_cut_with_those_above_it(disk, tmp_path):
    disk, root = disk
    durable.make_directory(root / "runs" / "tiny")
    durable.write_text(root / "runs" / "tiny" / "a", NEW)
    disk.promise(NEW)
    for image, promised in left(disk, tmp_path):
        assert text(image, "runs/tiny/a") in ((NEW,) if promised else (None, NEW))


def test_a_published_directory_is_whole_or_not_there(disk, tmp_path):
    disk, root = disk
    made = root / "made" / "below"
    made.mkdir(parents=True)
    (made / "a").write_text(NEW)
    (root / "made" / "b").write_text(NEW)
    durable.publish(root / "made", root / "out")
    disk.promise(NEW)
    found = set()
    for image, promised in left(disk, tmp_path):
        if promised or (image / "out").exists():
            assert text(image, "out/below/a") == text(image, "out/b") == NEW
        found.add((image / "out").exists())
    assert found == {True, False}


def test_an_error_while_it_is_written_leaves_the_old_file_alone(tmp_path):
    durable.write_text(tmp_path / "a", OLD)
    with pytest.raises(RuntimeError), durable.replacing(tmp_path / "a") as new:
        new.write_text(NEW)
        raise RuntimeError
    assert text(tmp_path, "a") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_sync_that_fails_is_an_error_but_for_directories_that_know_none(
    tmp_path, monkeypatch
):
    def fail(fd):
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "a").write_text(OLD)
    failure = errno.EINVAL
    durable.sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        durable.sync(tmp_path / "a")
    failure = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        durable.sync(tmp_path)
