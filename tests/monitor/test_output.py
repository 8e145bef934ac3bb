"""Logs and output that can't be written: said once, and again when they can."""

import io
import os

import pytest

from jmoe.monitor import output
from tests.faults import full


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_lines_wait_for_room_whole_and_in_order(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    with full.Disk(tmp_path, room=8) as disk:
        lines = output.Lines(path)
        assert [lines.add(f"line {n}") for n in range(4)] == [True, *[False] * 3]
        assert path.read_text() == "line 0\nl"
        assert len(warnings(caplog)) == 1
        lines.sync()
        disk.room = 100
        assert lines.add("line 4")
        lines.sync()
        lines.close()
    assert path.read_text() == "".join(f"line {n}\n" for n in range(5))
    reason = f"[Errno 28] No space left on device: '{path}'"
    assert warnings(caplog) == [
        f"{path} can't be written, and the run goes on without it: {reason}",
        f"{path} can be written again.",
    ]


def test_what_waits_is_bounded_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_KEPT_BYTES", 20)
    with full.Disk(tmp_path, room=3) as disk:
        lines = output.Lines(tmp_path / "a")
        for n in range(9):
            lines.add(f"line {n}")
        disk.room = 100
        lines.add("last")
        lines.add("line 9")
        lines.close()
    assert (tmp_path / "a").read_text() == "line 0\nline 1\nline 2\nlast\nline 9\n"


def test_a_disk_that_cannot_sync_is_told_of(tmp_path, caplog, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    lines = output.Lines(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", fail)
    lines.sync()
    lines.close()
    assert "Input/output error" in caplog.text


def test_closing_without_room_is_no_error(tmp_path, caplog):
    with full.Disk(tmp_path, room=0):
        lines = output.Lines(tmp_path / "a")
        lines.add("line")
        lines.close()
    assert len(warnings(caplog)) == 1


@pytest.fixture
def left_pipe():
    """A pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as file:
        yield file
        with open(os.devnull, "w") as null:  # what is left goes there
            os.dup2(null.fileno(), write)


def test_output_that_nobody_reads_is_told_of_once(left_pipe, caplog):
    stream = output.Forgiving(left_pipe, "Standard output")
    for _ in range(3):
        print("line", file=stream, flush=True)
    (line,) = warnings(caplog)
    assert line.startswith("Standard output can't be written, and the run goes on")
    assert "Broken pipe" in line


def test_output_that_can_be_written_again_is_told_of(tmp_path, caplog):
    with full.Disk(tmp_path, room=0) as disk, (tmp_path / "a").open("w") as file:
        stream = output.Forgiving(file, "Standard output")
        print("first", file=stream, flush=True)
        disk.room = 100
        print("second", file=stream, flush=True)
    assert (tmp_path / "a").read_text() == "first\nsecond\n"
    assert [line.split()[2] for line in warnings(caplog)] == ["can't", "can"]


def test_otherwise_it_is_the_stream(capsys):
    stream = output.Forgiving(io.StringIO(), "x")
    print("line", file=stream)
    assert stream.getvalue() == "line\n" and not stream.isatty()
