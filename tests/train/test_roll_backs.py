"""Back before a spike and on without its data: the same as never to have seen them."""

import contextlib
import io
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jmoe.config import RunConfig, override
from jmoe.monitor import run_files
from jmoe.train import guard, stretch
from jmoe.train.guard import Spoilt
from jmoe.train.inputs import next_batch
from jmoe.train.loop import train
from jmoe.train.roll_backs import RollBacks
from tests.train.whole_runs import assert_same_end, last_state, rows

STEPS, SPIKE, BACK = 20, 14, 12
BATCH = 4  # sequences
BAD = range((SPIKE - 1) * BATCH, SPIKE * BATCH)  # sequences that make the spike
SEEN = 16  # the step after which it is: that of a checkpoint, which isn't written


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def run(quick) -> RunConfig:
    return settings(quick, "on_spike=roll_back", "spike_score=3")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch, quickly):
    with_a_spike(monkeypatch)


def with_a_spike(monkeypatch) -> None:
    """A few losses are enough to see one, and some sequences are noise."""
    monkeypatch.setattr(guard, "ENOUGH", 4)
    monkeypatch.setattr(guard, "WINDOW", 4)
    poison(monkeypatch, BAD)


def poison(monkeypatch, bad: range, *, kill_at: int = 0, jump=(-1, -1)) -> None:
    """Makes noise of the sequences in `bad`.

    Args:
      kill_at: ends the run when so many batches are asked for.
      jump: a position at which the loader is moved, and where to.
    """
    asked = iter(range(1, 1000))

    def read(loader, count):
        if next(asked) == kill_at:
            raise Killed
        position = loader.get_state()
        if position["sequences"] == jump[0]:
            loader.set_state(position | {"sequences": jump[1]})
        begin = loader.get_state()["sequences"]
        batch = next_batch(loader, count)
        if begin in bad:
            noise = np.random.default_rng(begin)
            tokens = noise.integers(0, 300, batch.tokens_BT.shape, np.int32)
            batch = batch._replace(tokens_BT=tokens)
        return batch

    monkeypatch.setattr(stretch, "next_batch", read)


def settings(run, *given) -> RunConfig:
    return override(run, [f"train.{setting}" for setting in given])


def noted(workdir: pathlib.Path) -> list[dict]:
    return list(run_files.read_rows(workdir / run_files.ROLL_BACKS))


@pytest.fixture(scope="module")
def whole(run, quickly, tmp_path_factory) -> pathlib.Path:
    """The directory of a run that went back once and wasn't interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out:
        with_a_spike(patch)
        with contextlib.redirect_stdout(out):
            assert train(run, workdir) == 0
        (workdir / "terminal").write_text(out.getvalue())
    return workdir


def test_a_run_goes_back_and_says_so_and_logs_no_step_twice(whole):
    said = (whole / "terminal").read_text().splitlines()
    (line,) = [line for line in said if "Back to" in line]
    assert line.startswith(f"Step {SPIKE}: the loss is a spike (loss 6.")
    left_out = (SPIKE - BACK) * BATCH
    assert f" Back to step {BACK}, and on without {left_out} sequences, up to" in line
    (row,) = noted(whole)
    assert row["sequences"] == [BACK * BATCH, SPIKE * BATCH]
    assert (row["step"], row["spoilt"]) == (BACK, SPIKE)
    logged = [row for row in rows(whole) if "loss" in row]
    assert [row["step"] for row in logged] == [10, STEPS]
    assert [row["rolled_back"] for row in logged] == [0, 1]
    tokens = [row["tokens"] for row in logged]
    assert tokens == [step * BATCH * 32 for step in (10, STEPS)]  # trained on


@pytest.mark.parametrize(("every", "back"), [(4, BACK), (100, 0)])
def test_it_ends_as_one_that_never_saw_the_data_left_out(
    run, whole, tmp_path, monkeypatch, every, back
):
    run = settings(run, f"checkpoint_every={every}")
    went_back, without = {4: whole, 100: tmp_path / "back"}[every], tmp_path / "without"
    if every == 100:
        assert train(run, went_back) == 0
    poison(monkeypatch, BAD, jump=(back * BATCH, SPIKE * BATCH))
    assert train(run, without) == 0
    assert [row["step"] for row in noted(went_back)] == [back]
    assert not noted(without)
    got, want = (last_state(run, workdir) for workdir in (went_back, without))
    assert got[1:] == want[1:]  # position, with what the guard knows, and step
    same = jax.tree.map(np.array_equal, got[0], want[0])
    assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize(
    "kill_at",
    [
        SPIKE + 1,  # before the spike is seen
        SEEN + 1,  # back again, before the first step
        SEEN + 6,  # after the next checkpoint
    ],
)
def test_one_that_is_killed_about_it_goes_on_to_the_same_end(
    run, whole, tmp_path, monkeypatch, kill_at
):
    poison(monkeypatch, BAD, kill_at=kill_at)
    with pytest.raises(Killed):
        train(run, tmp_path / "run")
    assert len(noted(tmp_path / "run")) == (kill_at > SEEN)
    poison(monkeypatch, BAD)
    assert train(run, tmp_path / "run") == 0
    assert_same_end(run, tmp_path / "run", whole)
    assert noted(tmp_path / "run") == noted(whole)


def test_from_an_older_checkpoint_it_leaves_out_the_same_data_at_the_same_step(
    run, whole, tmp_path, monkeypatch
):
    poison(monkeypatch, BAD, kill_at=SEEN + 3)
    with pytest.raises(Killed):
        train(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(BACK))
    poison(monkeypatch, range(0))  # what was left out isn't read to know that
    assert train(run, tmp_path / "run") == 0
    assert_same_end(run, tmp_path / "run", whole)


def test_too_many_to_one_checkpoint_end_the_run_until_more_are_allowed(
    run, tmp_path, monkeypatch
):
    bad = range(BAD.start, BAD.start + 3 * BATCH)  # of three steps
    poison(monkeypatch, bad)
    few = settings(run, "max_roll_backs=2")
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="to step 12 as often as it may"):
            train(few, tmp_path / "run")
        assert len(noted(tmp_path / "run")) == 2
    assert train(settings(run, "max_roll_backs=3"), tmp_path / "run") == 0
    ranges = [row["sequences"] for row in noted(tmp_path / "run")]
    assert ranges == [[48, 56], [56, 60], [60, 64]]
    assert rows(tmp_path / "run")[-2]["tokens"] == STEPS * BATCH * 32


def test_a_path_that_was_left_is_forgotten(tmp_path):
    class Loader:
        def get_state(self):
            return {"sequences": 10}

    back = RollBacks(tmp_path, most=3)
    back.add(8, Loader(), Spoilt(9, 40, "One."))
    back.add(4, Loader(), Spoilt(9, 60, "Two."))  # as step 8's checkpoint is damaged
    assert [row["step"] for row in noted(tmp_path)] == [4]
    for known in (back, RollBacks(tmp_path, most=3)):
        assert [known.count(step) for step in (4, 5, 9)] == [0, 1, 1]
        assert [known.left_out(step) for step in (4, 5)] == [0, 50]
