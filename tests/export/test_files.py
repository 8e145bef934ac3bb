"""What was interrupted is gone on with, and is never taken for whole."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from jmoe.export.export_run import export_run
from jmoe.export.import_run import import_run
from tests.faults import power

SHARD = 100_000

# Fills a small disk while it is exported to, then makes room and tries again.
FULL_DISK = """
import contextlib, pathlib, subprocess, sys
from jmoe.export.export_run import export_run

workdir, disk = map(pathlib.Path, sys.argv[1:])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], check=True)

def fill(total):
    def progress(nbytes):
        with (disk / "junk").open("ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(50_000)):
                    pass
    return progress

def export(**options):
    export_run(workdir, disk / "out", shard_bytes=100_000, **options)

try:
    export(started=fill)
except OSError as error:
    print(error)
print(sorted(path.name for path in disk.iterdir()))
(disk / "junk").unlink()
export(started=lambda total: lambda nbytes: None)
print(sorted(path.name for path in disk.iterdir()))
"""


def quiet(_total):
    return lambda nbytes: None


def stop_after(share: float):
    """`started` of a conversion that ends once this share of it is written."""

    def started(total):
        done = 0

        def progress(nbytes):
            nonlocal done
            done += nbytes
            if done >= share * total:
                raise KeyboardInterrupt

        return progress

    return started


def export(workdir, out, **options):
    return export_run(
        workdir, out, **{"shard_bytes": SHARD, "started": quiet} | options
    )


def files(directory: pathlib.Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def shards(directory: pathlib.Path) -> dict[str, int]:
    """Every whole shard, and when it was written."""
    lines = (directory / "journal.jsonl").read_text().splitlines()
    names = [row["file"] for row in map(json.loads, lines) if "file" in row]
    return {name: (directory / name).stat().st_mtime_ns for name in names}


@pytest.fixture
def interrupted(workdir, tmp_path):
    """An export that was stopped halfway: (workdir, out, its whole shards)."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(workdir, out, started=stop_after(0.5))
    assert not out.exists()
    found = shards(tmp_path / "out.partial")
    assert 0 < len(found)
    return workdir, out, found


def test_an_interrupted_export_goes_on_at_its_whole_shards(interrupted, tmp_path):
    workdir, out, found = interrupted
    made = export(workdir, out)
    assert len(found) < len(made.shards)
    for name, written in found.items():
        assert (out / name).stat().st_mtime_ns == written
    export(workdir, tmp_path / "again")
    assert files(out) == files(tmp_path / "again")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("damage", ["altered", "cut short", "gone"])
def test_a_shard_that_is_no_longer_what_was_written_is_written_again(
    interrupted, tmp_path, damage
):
    workdir, out, found = interrupted
    path = tmp_path / "out.partial" / min(found)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    changed = {"altered": data, "cut short": data[:-1], "gone": None}[damage]
    path.unlink() if changed is None else path.write_bytes(changed)
    export(workdir, out)
    export(workdir, tmp_path / "again")
    assert files(out) == files(tmp_path / "again")


def test_what_was_begun_otherwise_is_begun_anew(interrupted, tmp_path):
    workdir, out, _ = interrupted
    export(workdir, out, dtype="bfloat16")
    export(workdir, tmp_path / "again", dtype="bfloat16")
    assert files(out) == files(tmp_path / "again")


def test_one_place_is_written_to_by_one_export_at_a_time(workdir, tmp_path):
    def progress(nbytes):
        with pytest.raises(ValueError, match=rf"out' is being .*process {os.getpid()}"):
            export(workdir, tmp_path / "out", dtype="bfloat16")

    export(workdir, tmp_path / "out", started=lambda total: progress)
    export(workdir, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again", "run"}


def test_an_interrupted_import_goes_on_at_its_whole_chunks(workdir, tmp_path):
    export(workdir, tmp_path / "hf")
    imported = functools.partial(import_run, tmp_path / "hf")
    with pytest.raises(KeyboardInterrupt):
        imported(tmp_path / "a", started=stop_after(0.5))
    assert not (tmp_path / "a").exists()
    found = shards(tmp_path / "a.partial")
    assert found
    imported(tmp_path / "a", started=quiet)
    for name, written in found.items():
        chunk = tmp_path / "a" / "checkpoints" / "0" / name.removeprefix("arrays/")
        assert chunk.stat().st_mtime_ns == written
    export(tmp_path / "a", tmp_path / "hf2")
    weights = [files(tmp_path / name) for name in ("hf", "hf2")]
    for name in weights[0]:
        if name.startswith("model"):
            assert weights[0][name] == weights[1][name]


def test_a_killed_export_leaves_no_directory_that_looks_whole(workdir, tmp_path):
    script = (
        "import os, pathlib, signal, sys\n"
        "from jmoe.export.export_run import export_run\n"
        "done = [0]\n"
        "def progress(nbytes):\n"
        "    done[0] += nbytes\n"
        "    if done[0] > 800_000:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "workdir, out = map(pathlib.Path, sys.argv[1:])\n"
        "export_run(workdir, out, started=lambda n: progress, shard_bytes=100_000)\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, str(workdir), str(out)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / "out.partial").exists()
    found = shards(tmp_path / "out.partial")
    export(workdir, out)
    assert found
    assert all((out / name).stat().st_mtime_ns == at for name, at in found.items())


@pytest.mark.parametrize("left", [[], [".journal.jsonl.tmp"]])
def test_an_export_killed_before_its_first_note_is_not_in_the_way(
    workdir, tmp_path, left
):
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).write_text('{"wo')
    export(workdir, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_note_that_was_cut_short_spoils_none_after_it(interrupted):
    workdir, out, found = interrupted
    journal = out.with_name("out.partial") / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"file": "model')
    with pytest.raises(KeyboardInterrupt):
        export(workdir, out, started=stop_after(0.8))
    assert set(found) < set(shards(out.with_name("out.partial")))


def convert(direction: str, workdir: pathlib.Path, model: pathlib.Path, out):
    if direction == "export":
        export(workdir, out)
    else:
        import_run(model, out, started=quiet, assignments=["name=imported"])


@pytest.mark.parametrize(("direction", "every"), [("export", 3), ("import", 15)])
def test_a_power_cut_at_any_moment_leaves_a_directory_whole_or_not_there(
    workdir, tmp_path, direction, every
):
    export(workdir, tmp_path / "model")
    (tmp_path / "root").mkdir()
    with power.Disk(tmp_path / "root", every=every) as disk:
        convert(direction, workdir, tmp_path / "model", tmp_path / "root" / "out")
        disk.promise("out")
    want = {f"out/{name}": data for name, data in files(disk.root / "out").items()}
    whole = 0
    for image in disk.images:
        found = dict(image.content)
        assert "out" in found or not image.promised
        if "out" in found:
            assert {**found, **want} == found
            whole += 1
    assert 0 < whole < len(disk.images)


def test_an_export_goes_on_after_a_power_cut(workdir, tmp_path):
    (tmp_path / "root").mkdir()
    with power.Disk(tmp_path / "root", every=20) as disk:
        export(workdir, tmp_path / "root" / "out")
    want = files(tmp_path / "root" / "out")
    begun = [image for image in disk.images if "out.partial" in dict(image.content)]
    for count, image in enumerate(begun[::5]):
        image.restore(tmp_path / str(count))
        export(workdir, tmp_path / str(count) / "out")
        assert files(tmp_path / str(count) / "out") == want


def can_mount() -> bool:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(probe, capture_output=True).returncode
    )


@pytest.mark.skipif(not can_mount(), reason="no small disk can be mounted here")
def test_a_full_disk_is_one_error_and_more_room_lets_it_go_on(workdir, tmp_path):
    (tmp_path / "disk").mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", FULL_DISK]
    done = subprocess.run(
        [*command, str(workdir), str(tmp_path / "disk")],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    complaint, full, after = done.stdout.splitlines()
    assert "The disk is full: " in complaint and "goes on from it" in complaint
    assert full == "['junk', 'out.partial']"
    assert after == "['out']"


@pytest.mark.skipif(not can_mount(), reason="no small disk can be mounted here")
def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    workdir, tmp_path
):
    (tmp_path / "disk").mkdir()
    script = FULL_DISK.replace("size=12m", "size=900k")
    command = ["unshare", "-rm", sys.executable, "-c", script]
    done = subprocess.run(
        [*command, str(workdir), str(tmp_path / "disk")],
        capture_output=True,
        text=True,
    )
    assert "GB more, and the disk has 0.00 GB free" in done.stdout
    assert done.stdout.splitlines()[1] == "[]"
