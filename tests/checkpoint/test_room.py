"""A lack of room is known by whoever says so, and by nothing else."""

import errno
import pathlib

import pytest

from jmoe.checkpoint import room

PATH = pathlib.Path("runs/40")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "", "a"), "[Errno 28] No space left on device: 'a'"),
        (OSError(errno.EDQUOT, ""), "[Errno 122] Disk quota exceeded: 'runs/40'"),
        (
            ValueError("Error writing\nd/86f4: No space left on device [code='28']"),
            "[Errno 28] No space left on device: 'runs/40'",
        ),
    ],
)
def test_a_lack_of_room_is_one_line_with_the_file(error, line):
    assert str(room.lacking(error, PATH)) == line


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "No space left on device"), ValueError("x"), OSError("x")],
)
def test_other_errors_are_not(error):
    assert room.lacking(error, PATH) is None
