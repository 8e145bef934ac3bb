"""Sums of files are zlib's, however their bytes are shared out; and see any change."""

import pathlib
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.checkpoint import manifest, sums
from jmoe.checkpoint.manifest import DamagedCheckpointError


@settings(deadline=None)
@given(st.binary(), st.binary())
def test_the_sum_of_two_pieces_is_that_of_both_in_a_row(first, second):
    got = sums.combine(zlib.crc32(first), zlib.crc32(second), len(second))
    assert got == zlib.crc32(first + second)


def test_the_second_piece_may_be_larger_than_any_file():
    size = 3 << 40  # all zeros: as if 3 of them followed, one after the other
    crc, at = 12345, 0
    zeros = {1 << 40: sums.combine(0, 0, 1 << 40), 0: 0}
    while at < size:
        crc, at = sums.combine(crc, zeros[1 << 40], 1 << 40), at + (1 << 40)
    assert crc == sums.combine(12345, 0, size) != 12345


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, bytes]:
    """Files below `tmp_path`, some larger than what one thread reads at a time."""
    monkeypatch.setattr(sums, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(sums, "_CHUNK_BYTES", 5)
    content = {
        "a/large": bytes(range(200)),
        "empty": b"",
        "b": b"b",
        "c/d/e": b"e" * 33,
    }
    for name, data in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return content


def read_by(count: int, directory: pathlib.Path, files: dict[str, bytes]):
    """What each of so many processes reads."""
    sizes = {name: len(data) for name, data in files.items()}
    return [sums.read(directory, sizes, index, count) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 500])
def test_processes_share_the_bytes_evenly_and_their_sums_join(tmp_path, files, count):
    shares = read_by(count, tmp_path, files)
    sizes = [sum(part.size for part in share) for share in shares]
    assert sum(sizes) == 234 and max(sizes) - min(sizes) <= 1
    joined = sums.join(part for share in shares for part in share)
    want = {name: (len(data), zlib.crc32(data)) for name, data in files.items() if data}
    assert joined == want


@pytest.mark.parametrize("count", [1, 3])
def test_a_changed_byte_is_found_whoever_reads_it(tmp_path, files, count):
    written = sums.of_files(tmp_path, files)
    assert written == {name: [len(x), zlib.crc32(x)] for name, x in files.items()}
    for name, data in files.items():
        for at in range(0, len(data), 7):
            changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            (tmp_path / name).write_bytes(changed)
            parts = sum(read_by(count, tmp_path, files), [])
            with pytest.raises(DamagedCheckpointError, match=f"{name} was altered"):
                manifest.compare(tmp_path, written, parts)
        (tmp_path / name).write_bytes(data)
    manifest.compare(tmp_path, written, sum(read_by(count, tmp_path, files), []))


def test_a_file_that_goes_while_it_is_read_is_named(tmp_path, files):
    written = sums.of_files(tmp_path, files)
    (tmp_path / "a/large").unlink()
    with pytest.raises(DamagedCheckpointError, match="a/large is missing"):
        manifest.compare(tmp_path, written, sum(read_by(3, tmp_path, files), []))


def test_what_processes_left_is_taken_by_process_and_nothing_else_stays(tmp_path):
    for index in (10, 9, 1):
        directory = tmp_path / f"ocdbt.process_{index}"
        (directory / "d").mkdir(parents=True)
        (directory / "d" / "data").write_bytes(bytes([index]))
        sums.leave(directory)
    sums.leave(tmp_path / "of a process that wrote nothing")
    assert list(sums.collect(tmp_path).items()) == [
        (f"ocdbt.process_{index}/d/data", [1, zlib.crc32(bytes([index]))])
        for index in (1, 9, 10)
    ]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == (
        ["data"] * 3
    )
