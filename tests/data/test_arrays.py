"""Arrays on disk: what NumPy would write, known again, and never half in silence."""

import os

import numpy as np
import pytest

from jmoe.data import arrays
from tests.faults import full


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint64])
def test_parts_become_the_file_that_numpy_would_write(tmp_path, dtype):
    array = np.arange(1000, dtype=dtype)
    parts = [array[:10], array[10:10], array[10:].astype(np.int64)]
    arrays.write(tmp_path / "a.npy", dtype, 1000, parts)
    np.save(tmp_path / "b.npy", array)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    found = arrays.read(tmp_path / "a.npy")
    assert np.array_equal(found, array) and not found.flags.writeable


def test_a_full_disk_is_an_error_with_the_file_however_small_the_array_is(tmp_path):
    with full.Disk(tmp_path, room=130), pytest.raises(OSError) as error:
        arrays.write(tmp_path / "a.npy", np.uint16, 9, [np.zeros(9)])
    path = tmp_path / "a.npy"
    assert str(error.value) == f"[Errno 28] No space left on device: '{path}'"


def test_a_pickle_is_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([object]))
    with pytest.raises(ValueError):
        arrays.read(tmp_path / "a.npy")


def test_a_seal_tells_every_change_of_a_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", 16)
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    sealed = arrays.seal(path)
    assert sealed.size == 100 and len(sealed.sums) == 7
    for at in (0, 15, 16, 99):
        content = bytearray(range(100))
        content[at] ^= 1
        path.write_bytes(content)
        pairs = zip(arrays.seal(path).sums, sealed.sums, strict=True)
        changed = [number for number, (x, y) in enumerate(pairs) if x != y]
        assert changed == [at // 16]


def test_a_file_is_untouched_until_its_size_or_its_time_changes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"text")
    sealed = arrays.seal(path)
    assert arrays.is_untouched(path, sealed)
    os.utime(path, ns=(0, sealed.mtime_ns + 1))
    assert not arrays.is_untouched(path, sealed)
    path.write_bytes(b"texts")
    os.utime(path, ns=(0, sealed.mtime_ns))
    assert not arrays.is_untouched(path, sealed)
