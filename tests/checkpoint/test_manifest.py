"""A manifest is what was written, of the step that its directory names; or damaged."""

import json
import zlib

import pytest

from jmoe.checkpoint import manifest
from jmoe.checkpoint.manifest import DamagedCheckpointError

WRITTEN = {
    "step": 40,
    "position": {"sequences": 7, "p": 0.1},
    "arrays": {"x": "int8[]"},
}


@pytest.fixture(params=["with a sum", "of jmoe 0.1"])
def whole(request, tmp_path):
    """(a directory with a manifest, whether it has a sum of its own)."""
    directory = tmp_path / "40"
    directory.mkdir()
    (directory / "data").write_bytes(b"data")
    manifest.write(directory, WRITTEN)
    has_sum = request.param == "with a sum"
    if not has_sum:
        path = directory / manifest.FILE_NAME
        text = json.loads(path.read_text())
        del text["crc"]
        path.write_text(json.dumps(text, indent=1))
    return directory, has_sum


def test_it_is_read_as_it_was_written(whole):
    directory, _ = whole
    files = {"data": [4, zlib.crc32(b"data")]}
    assert manifest.read(directory) == {**WRITTEN, "files": files}


def test_a_bit_that_flips_is_found_or_changes_nothing(whole):
    directory, has_sum = whole
    want, path = manifest.read(directory), directory / manifest.FILE_NAME
    data = path.read_bytes()
    found = 0
    for at in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            got = manifest.read(directory)
        except DamagedCheckpointError:
            found += 1
        else:
            assert got == want or not has_sum
    assert found > 4 * len(data)


@pytest.mark.parametrize(
    "change",
    [
        {"position": {"sequences": 8, "p": 0.1}},
        {"position": {"sequences": 7, "p": 0.1, "q": 0}},
        {"arrays": {}},
        {"files": {}},
        {"crc": 0},
        {"crc": "0"},
        {"more": 1},
    ],
    ids=str,
)
def test_an_edited_one_is_damaged(whole, change):
    directory, has_sum = whole
    path = directory / manifest.FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if has_sum or change.keys() & {"crc", "more"}:
        with pytest.raises(DamagedCheckpointError, match="manifest.json was altered"):
            manifest.read(directory)
    else:
        manifest.read(directory)


@pytest.mark.parametrize(
    "text", ["[]", "3", "{}", '"step"', '{"step": 40, "position": {}, "arrays": {}}']
)
def test_other_json_is_damaged(whole, text):
    directory, _ = whole
    (directory / manifest.FILE_NAME).write_text(text)
    with pytest.raises(DamagedCheckpointError, match="manifest.json was altered"):
        manifest.read(directory)


def test_that_of_another_step_is_damaged(whole):
    directory, _ = whole
    other = directory.rename(directory.with_name("41"))
    with pytest.raises(DamagedCheckpointError, match="41 is .* that of step 40"):
        manifest.read(other)
