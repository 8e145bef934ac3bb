"""A run goes on with more steps, and its schedules do what was written down."""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.checkpoint.store import Store
from jmoe.checkpoint.workdir import open_run, read_run
from jmoe.config import HorizonConfig, override
from jmoe.config.presets import tiny_run
from jmoe.train.horizon import go_on, values
from jmoe.train.loop import train
from jmoe.train.trained import CHECKPOINTS
from tests.train.whole_runs import assert_same_end, last_state, rows

RECORDED = tiny_run()  # 420 steps
ENDED = {"learning rate": 2e-5, "bias rate": 5e-4, "MTP weight": 0.1}
# Planned over 1000 steps, the rate at step 420 is 70 into a cosine of 450.
ANEW = 2e-3 * (0.02 + 0.98 * (1 + math.cos(math.pi * 70 / 450)) / 2)

pytestmark = pytest.mark.usefixtures("sharing_programs")


def recorded(workdir: pathlib.Path, step: int, *settings: str) -> pathlib.Path:
    """The directory of a run that was trained for so many steps."""
    open_run(workdir, override(RECORDED, settings))
    with Store(workdir / CHECKPOINTS) as store:
        store.save(step, {"x": jnp.zeros(1)}, {})
        store.wait()
    return workdir


@pytest.fixture
def finished(tmp_path) -> pathlib.Path:
    return recorded(tmp_path / "run", 420)


def test_more_steps_are_refused_with_what_each_decision_would_do(finished):
    with pytest.raises(ValueError) as error:
        go_on(finished, override(RECORDED, ["train.steps=1000"]))
    assert str(error.value) == (
        "train.steps=1000 goes beyond the 420 steps that the schedules of this run "
        "were planned over. Write down what becomes of them:\n"
        "  --set schedule.beyond=hold: they stay as they end: learning rate 2e-05, "
        "bias rate 0.0005, MTP weight 0.1\n"
        "  --set schedule.steps=1000: they are planned anew: at step 420 learning rate "
        f"2e-05 -> {ANEW:.3g}, bias rate 0.0005 -> 0.005, MTP weight 0.1 -> 0.3"
    )
    assert read_run(finished) == RECORDED


def test_held_schedules_keep_their_last_values(finished):
    held = ["train.steps=1000", "schedule.beyond=hold"]
    run, said = go_on(finished, override(RECORDED, held))
    assert run.schedule == HorizonConfig(steps=420, beyond="hold")
    for step in (419, 420, 999):
        assert values(run, step) == pytest.approx(ENDED)
    assert said == (
        "Schedules over 420 steps, then held (were over 420 steps): at step 420 "
        "learning rate 2e-05 -> 2e-05, bias rate 0.0005 -> 0.0005, MTP weight 0.1 -> "
        "0.1."
    )


def test_schedules_planned_anew_have_the_values_of_a_run_of_that_length(finished):
    longer = override(RECORDED, ["train.steps=1000", "schedule.steps=1000"])
    run, said = go_on(finished, longer)
    assert run == longer
    want = {"learning rate": ANEW, "bias rate": 5e-3, "MTP weight": 0.3}
    assert values(run, 420) == pytest.approx(want)
    # The bias rate turns at 0.7, the MTP weight at 0.676 of the steps.
    turns = [(675, 5e-3, 0.3), (676, 5e-3, 0.1), (699, 5e-3, 0.1), (700, 5e-4, 0.1)]
    for step, bias_rate, mtp_weight in turns:
        got = values(run, step)
        assert got["bias rate"] == pytest.approx(bias_rate)
        assert got["MTP weight"] == pytest.approx(mtp_weight)
    assert f"at step 420 learning rate 2e-05 -> {ANEW:.3g}, bias" in str(said)


def test_a_decision_stays_and_is_told_once(finished):
    longer = override(RECORDED, ["train.steps=1000"])
    decided, _ = go_on(finished, override(longer, ["schedule.beyond=hold"]))
    open_run(finished, decided)
    assert go_on(finished, longer) == (decided, None)
    open_run(finished, override(decided, ["schedule.beyond=refuse", "train.steps=300"]))
    with pytest.raises(ValueError, match="beyond the 420 steps"):
        go_on(finished, longer)


@pytest.mark.parametrize("steps", [300, 420])
def test_fewer_steps_stop_earlier_on_the_same_schedules(tmp_path, steps):
    workdir = recorded(tmp_path / "run", 140)
    run, said = go_on(workdir, override(RECORDED, [f"train.steps={steps}"]))
    assert (run.horizon, run.train.steps, said) == (420, steps, None)
    assert (run == RECORDED) == (steps == 420)


def test_another_peak_is_told(finished):
    run, said = go_on(finished, override(RECORDED, ["optimizer.schedule.peak=4e-3"]))
    assert "at step 420 learning rate 2e-05 -> 4e-05, bias rate 0.0005" in str(said)


@pytest.mark.parametrize("step", [None, 0])
def test_nothing_is_fixed_before_the_first_step(tmp_path, step):
    longer = override(RECORDED, ["train.steps=1000"])
    open_run(tmp_path / "run", RECORDED)
    if step is not None:
        recorded(tmp_path / "run", step)
    assert go_on(tmp_path / "run", longer) == (longer, None)


def test_a_record_from_before_there_were_horizons_has_its_steps(finished):
    record = json.loads((finished / "config.json").read_text())
    del record["schedule"]
    (finished / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="beyond the 420 steps"):
        go_on(finished, override(RECORDED, ["train.steps=1000"]))


@pytest.fixture(scope="module")
def short_run(smallest, tmp_path_factory):
    """A run that ended, and how it would have gone on."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert train(smallest, workdir) == 0
    return workdir


def test_a_run_that_goes_on_and_holds_ends_as_if_it_had_been_told_at_first(
    smallest, short_run, tmp_path, capsys
):
    longer = override(smallest, ["train.steps=44"])
    with pytest.raises(ValueError, match="train.steps=44 goes beyond the 40 steps"):
        train(longer, short_run)
    assert train(override(longer, ["schedule.beyond=hold"]), short_run) == 0
    assert "Schedules over 40 steps, then held" in capsys.readouterr().out
    told = override(longer, ["schedule.beyond=hold", "schedule.steps=40"])
    assert read_run(short_run) == told
    assert train(told, tmp_path / "told") == 0
    assert_same_end(told, short_run, tmp_path / "told")
    rates = [row["learning_rate"] for row in rows(short_run) if "loss" in row]
    # The last of 8 steps from 1 to 0.1 of the peak.
    np.testing.assert_allclose(rates[39:], 1e-2 * (1 - 0.9 * 7 / 8), rtol=1e-5)


def test_a_run_that_stops_early_goes_on_along_the_same_schedules(smallest, tmp_path):
    early, later = (
        override(smallest, [f"train.steps={steps}", "schedule.steps=40"])
        for steps in (5, 8)
    )
    assert train(early, tmp_path / "run") == 0
    assert train(override(smallest, ["train.steps=8"]), tmp_path / "run") == 0
    assert read_run(tmp_path / "run") == later
    assert train(later, tmp_path / "whole") == 0
    got, want = (last_state(later, tmp_path / name) for name in ("run", "whole"))
    np.testing.assert_array_equal(got[0].params["head"], want[0].params["head"])
