"""Whatever moment the power goes at, a run has its newest whole checkpoint or the one
before, and the files that go with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.checkpoint import manifest, paths
from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.retention import BEST
from jmoe.checkpoint.store import Store
from jmoe.config import override
from tests.faults import power
from tests.plain_run import plain_run

STEPS = (1, 2, 3)
ABSTRACT = {"x": jax.ShapeDtypeStruct((40,), "float32")}


def state(step: int) -> dict[str, jax.Array]:
    return {"x": jnp.arange(40.0) * step}


def restored(directory) -> int:
    """The step found, whose state and position are as they were; 0 if none was."""
    with Store(directory) as store:
        if store.latest_step() is None:
            return 0
        got, position, step = store.restore(ABSTRACT)
    assert position == {"batch": step}
    assert np.asarray(got["x"]).tobytes() == np.asarray(state(step)["x"]).tobytes()
    return step


@pytest.fixture(scope="module")
def saving(tmp_path_factory) -> power.Disk:
    """Three checkpoints were saved, and each time all but the newest removed."""
    root = tmp_path_factory.mktemp("disk")
    with power.Disk(root) as disk:
        with Store(root / "run" / "checkpoints", keep=1) as store:
            for step in STEPS:
                store.save(step, state(step), {"batch": step})
                store.wait()
                disk.promise(step)
    return disk


def test_every_cut_leaves_the_newest_checkpoint_or_the_one_before(saving, tmp_path):
    found = set()
    for count, image in enumerate(saving.images):
        image.restore(tmp_path / str(count))
        step = restored(tmp_path / str(count) / "run" / "checkpoints")
        assert (image.promised or 0) <= step <= (image.promised or 0) + 1
        found.add((image.promised, step))
    # Each was there in time, and each cut before its end left the one before.
    assert {(1, 1), (2, 2), (3, 3), (None, 0), (1, 2), (2, 3)} <= found


def test_every_cut_leaves_the_best_checkpoint_or_a_better_one(tmp_path):
    root, losses = tmp_path / "root", {1: 2.0, 2: 1.0, 3: 1.5}
    root.mkdir()
    with power.Disk(root) as disk:
        with Store(root / "run", keep=1, keep_best=1) as store:
            for step, loss in losses.items():
                store.save(step, state(step), {"batch": step}, loss)
                store.wait()
                disk.promise(step)
    found = set()
    for count, image in enumerate(disk.images):
        image.restore(tmp_path / str(count))
        with Store(tmp_path / str(count) / "run") as store:
            if image.promised:
                _, position, best = store.restore(ABSTRACT, BEST)
                assert position == {"batch": best}
                found.add((image.promised, best))
    assert found == {(1, 1), (1, 2), (2, 2), (3, 2)}
    assert {path.name for path in (root / "run").iterdir()} == {"2", "3"}


def test_no_cut_leaves_a_checkpoint_half_removed_under_its_name(saving, tmp_path):
    for count, image in enumerate(saving.images):
        image.restore(tmp_path / str(count))
        for path in (tmp_path / str(count)).glob("run/checkpoints/*"):
            if path.name.isdecimal():
                manifest.check_sums(path, manifest.read(path)["files"])


def test_a_checkpoint_is_synced_before_its_name_and_that_before_older_ones_go(saving):
    at = {call: index for index, call in enumerate(saving.calls)}
    above = "run/checkpoints"
    for step in STEPS[1:]:
        unfinished = f"{above}/{step}.orbax-checkpoint-tmp"
        named = at["rename", unfinished, f"{above}/{step}"]
        synced = {call[1] for call in saving.calls[:named] if call[0] == "fsync"}
        names = (paths.MERGED, "_METADATA", ".manifest.json.tmp")
        assert {unfinished, *(f"{unfinished}/{name}" for name in names)} <= synced
        older = f"{above}/{step - 1}"
        removed = at["rename", older, f"{older}.removed"]
        assert ("fsync", above) in saving.calls[named:removed]


def test_every_cut_leaves_the_record_of_a_run_old_or_new(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    old, new = plain_run(), override(plain_run(), ["train.steps=900"])
    with power.Disk(root) as disk:
        for run in (old, new):
            workdirs.open_run(root / "runs" / "tiny", run)
            disk.promise(run)
    found = set()
    for count, image in enumerate(disk.images):
        image.restore(tmp_path / str(count))
        workdir = tmp_path / str(count) / "runs" / "tiny"
        goes_on = workdirs.check_run(workdir, new)
        run = workdirs.read_run(workdir) if goes_on else None
        assert run in {None: (None, old), old: (old, new), new: (new,)}[image.promised]
        found.add(run)
    assert found == {None, old, new}


@pytest.mark.parametrize("anew", [False, True])
def test_a_cut_takes_of_a_file_that_grew_only_what_was_not_synced(tmp_path, anew):
    rows = [b"row %d\n" % i for i in range(8)]
    synced, newer = b"".join(rows[:4]), b"".join(rows[::-1] if anew else rows[4:])
    path = tmp_path / "log"
    path.write_bytes(synced)
    with power.Disk(tmp_path) as disk, path.open("r+b", buffering=0) as file:
        file.seek(0 if anew else len(synced))
        file.write(newer)
        for promised in range(20):  # at each, a cut, of which images differ
            disk.promise(promised)
    found = {dict(image.content)["log"] for image in disk.images}
    # None of what is newer, half of it, and all.
    assert len(found) == 3 and {synced, path.read_bytes()} < found
    assert all(content.startswith(synced) for content in found) != anew
