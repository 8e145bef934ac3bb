"""scripts/train.py on a full disk: one line that names the file, and nothing lost."""

import errno
import os

from jmoe.checkpoint import paths
from jmoe.checkpoint.store import Store
from jmoe.monitor import run_files
from tests.faults import full


def test_tokenising_without_room_is_one_line_with_the_file(
    script, smallest_arguments, tmp_path
):
    cache = tmp_path / "cache"
    arguments = [*smallest_arguments, f"--set=data.cache_dir={cache}"]
    with full.Disk(cache, room=20_000):
        outcome = script("train", f"--workdir={tmp_path / 'run'}", *arguments)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: [Errno 28] No space left on device: '")
    assert f"'{cache}/corpora/" in line
    assert not (tmp_path / "run").exists()


def saves(monkeypatch, *failing: int) -> None:
    """Makes these saves, counted from 1, find no room at their end."""
    finalize, count = paths.Renamed.finalize, iter(range(1, 100))

    async def full_at(self):
        if next(count) in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await finalize(self)

    monkeypatch.setattr(paths.Renamed, "finalize", full_at)


def test_a_run_goes_on_after_a_save_without_room_but_fails_if_it_is_the_last(
    script, smallest_arguments, sharing_programs, tmp_path, monkeypatch, caplog
):
    saves(monkeypatch, 2, 4, 5)  # of steps 20, and 40 twice
    arguments = [*smallest_arguments, "--set=train.checkpoint_every=10"]
    outcome = script("train", f"--workdir={tmp_path / 'run'}", *arguments)
    checkpoints = tmp_path / "run" / "checkpoints"
    full_at = f"[Errno 28] No space left on device: '{checkpoints}/"
    assert outcome.code == 2
    assert outcome.err == f"error: {full_at}40'\n"
    for step in (20, 40):
        assert f"Not saved: {full_at}{step}'. The next save will try" in caplog.text
    assert "Traceback" not in caplog.text
    with Store(checkpoints) as store:
        assert store.latest_step() == 30
    assert "10" in os.listdir(checkpoints)
    rows = run_files.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert max(row["step"] for row in rows) == 40
