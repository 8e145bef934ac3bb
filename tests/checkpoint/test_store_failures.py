"""A save that fails or is killed is reported, and what was there before stays."""

import errno
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jmoe.checkpoint.store import Store
from jmoe.data import durable
from tests.faults import full

SAVE_AND_HANG = """
import sys, time
import jax.numpy as jnp
from jmoe.checkpoint import manifest
from jmoe.checkpoint.store import Store

store = Store(sys.argv[1])
store.save(1, {"x": jnp.float32(1)}, {"batch": 1})
store.wait()
manifest.write = lambda *_: print("all but done", flush=True) or time.sleep(600)
store.save(2, {"x": jnp.float32(2)}, {"batch": 2})
store.wait()
"""


def test_a_writer_killed_just_before_it_is_done_leaves_the_checkpoint_before(
    tmp_path, caplog
):
    command = [sys.executable, "-c", SAVE_AND_HANG, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "all but done\n"
        writer.kill()
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    assert unfinished.exists()

    with Store(tmp_path) as store:
        assert store.latest_step() == 1
        got, position, _ = store.restore({"x": jax.ShapeDtypeStruct((), "float32")})
        assert (float(got["x"]), position) == (1.0, {"batch": 1})
        assert unfinished.exists()  # reading removes nothing
        store.save(2, {"x": jnp.float32(2)}, {})
    assert f"Removing {unfinished}" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_what_a_run_killed_at_its_very_end_left_goes_when_it_is_started_again(
    tmp_path,
):
    with Store(tmp_path, keep=2) as store:
        for step in (1, 2):
            store.save(step, {"x": jnp.float32(step)}, {})
    for name in ("0.removed", "3.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    with Store(tmp_path, keep=1) as store:
        got, _, step = store.restore({"x": jax.ShapeDtypeStruct((), "float32")})
        store.save(step, got, {})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


STATE = {"x": jnp.ones((512, 512))}


def test_a_failed_write_is_reported_and_can_be_repeated(tmp_path):
    with Store(tmp_path) as store:
        with full.file_limit(1 << 16):
            store.save(1, STATE, {})
            with pytest.raises(OSError) as error:
                store.wait()
        assert str(error.value) == f"[Errno 27] File too large: '{tmp_path / '1'}'"
        assert store.latest_step() is None
        store.save(1, STATE, {})
    assert Store(tmp_path).latest_step() == 1


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def test_a_save_after_one_without_room_warns_and_the_one_before_stays(
    tmp_path, caplog, monkeypatch
):
    with Store(tmp_path, keep=1) as store:
        store.save(1, STATE, {})
        store.wait()
        with full.file_limit(1 << 16):
            store.save(2, STATE, {})
            store.save(3, STATE, {})
            assert store.latest_step() == 1
            with pytest.raises(OSError, match="File too large: '.*/3'"):
                store.wait()
        with monkeypatch.context() as patch:
            patch.setattr(durable, "make_directory", no_room)
            store.save(4, STATE, {})
            assert store.latest_step() == 1
        store.save(5, STATE, {})
    assert "Not saved: [Errno 27] File too large: '" in caplog.text
    assert "Not saved: [Errno 28] No space left on device: 'somewhere'" in caplog.text
    assert os.listdir(tmp_path) == ["5"]


def test_one_of_several_processes_does_not_go_on_without_its_part(
    tmp_path, monkeypatch
):
    with Store(tmp_path) as store, monkeypatch.context() as patch:
        patch.setattr(durable, "make_directory", no_room)
        store.save(1, STATE, {})
        patch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(OSError, match="No space left"):
            store.save(2, STATE, {})


def test_a_directory_that_cannot_be_made_is_reported_by_save(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with Store(tmp_path / "file") as store, pytest.raises(OSError, match="file"):
        store.save(1, {"x": jnp.ones(3)}, {})


def test_a_position_that_json_cannot_hold_is_refused_before_anything_is_written(
    tmp_path,
):
    with Store(tmp_path / "new") as store:
        with pytest.raises(TypeError, match="bytes"):
            store.save(1, {"x": jnp.ones(3)}, {"iterator": b"state"})
    assert not (tmp_path / "new").exists()


def test_reading_needs_no_directory_and_makes_none(tmp_path):
    store = Store(tmp_path / "new")
    assert store.latest_step() is None
    with pytest.raises(FileNotFoundError, match="No whole checkpoint in .*new"):
        store.restore({})
    assert not (tmp_path / "new").exists()
