"""The disk without room behaves as the system's do, and misses nothing."""

import errno

import numpy as np
import pytest

from tests.faults import full


def test_a_write_is_short_then_fails_as_on_the_systems_own_full_device(tmp_path):
    with full.Disk(tmp_path, room=5), (tmp_path / "a").open("wb", 0) as file:
        assert (file.write(b"abc"), file.write(b"defg")) == (3, 2)
        with pytest.raises(OSError) as here:
            file.write(b"fg")
    with open("/dev/full", "wb", 0) as file, pytest.raises(OSError) as there:
        file.write(b"fg")
    assert str(here.value) == str(there.value)
    assert here.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_bytes() == b"abcde"


@pytest.mark.parametrize(("mode", "content"), [("a", "text"), ("x+b", b"t" * 10_000)])
def test_buffered_files_are_stopped_until_there_is_room(tmp_path, mode, content):
    with full.Disk(tmp_path, room=3) as disk:
        with pytest.raises(OSError, match="No space left"):
            with open(tmp_path / "a", mode) as file:
                file.write(content)
        (tmp_path / "a").unlink()
        disk.room = 10_000
        with (tmp_path / "a").open(mode) as file:
            file.write(content)
    assert (tmp_path / "a").stat().st_size == len(content)
    assert disk.written == 3 + len(content)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: np.ones(9).tofile(path),
        lambda path: np.lib.format.open_memmap(path, "w+", shape=(9,)).flush(),
    ],
)
def test_what_is_written_past_it_is_found(tmp_path, write):
    with pytest.raises(AssertionError, match="bytes were written past it"):
        with full.Disk(tmp_path, room=10**6):
            write(tmp_path / "a")


def test_elsewhere_there_is_room(tmp_path):
    (tmp_path / "full").mkdir()
    with full.Disk(tmp_path / "full", room=0):
        (tmp_path / "a").write_text("text")
    assert (tmp_path / "a").read_text() == "text"


def test_no_file_becomes_larger_than_its_limit(tmp_path):
    with full.file_limit(10), pytest.raises(OSError) as error:
        np.lib.format.open_memmap(tmp_path / "a", "w+", shape=(9,))
    assert error.value.errno == errno.EFBIG
    (tmp_path / "b").write_bytes(b"0" * 20)
