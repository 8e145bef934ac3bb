"""Checkpoints by steps and by the clock, at one step on all processes."""

import pytest

from jmoe.checkpoint import manifest
from jmoe.config import TrainConfig, override
from jmoe.train.loop import train
from jmoe.train.saving import Saver
from tests import several_processes


def config(**fields) -> TrainConfig:
    fields = {"steps": 100, "checkpoint_every": 30, "signal_every": 5} | fields
    return TrainConfig(batch_size=1, microbatch_size=1, **fields)


class Clock:
    """Seconds; `now` may be set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Watch:
    """A guard that has seen nothing."""

    state_is_good = True

    def state(self):
        return {}


class Kept:
    """A store and a loader that only take down what is saved."""

    def __init__(self):
        self.steps = []

    def get_state(self):
        return {"sequences": 0}

    def save(self, step, *_):
        self.steps.append(step)


def saved(cfg: TrainConfig, seconds_a_step: float) -> list[int]:
    """At which steps a run saves, of which each step takes so long."""
    kept, clock = Kept(), Clock()
    saver = Saver(cfg, kept, kept, clock)
    for step in range(1, cfg.steps + 1):
        clock.now += seconds_a_step
        if saver.is_due(step):
            saver.save(step, None, Watch())
    return kept.steps


def test_steps_that_divide_and_the_last_one_are_saved():
    assert saved(config(), seconds_a_step=1e6) == [30, 60, 90, 100]


def test_so_long_after_the_last_save_another_one_follows_where_processes_ask():
    by_time = config(checkpoint_minutes=2.0)  # 12 steps, seen at the next fifth
    assert saved(by_time, seconds_a_step=10) == [15, 30, 45, 60, 75, 90, 100]
    assert saved(by_time, seconds_a_step=1) == [30, 60, 90, 100]
    at_once = config(checkpoint_minutes=0.0, signal_every=20)
    assert saved(at_once, seconds_a_step=0) == [20, 30, 40, 60, 80, 90, 100]


@pytest.mark.parametrize("slow", [0, 1])
def test_what_time_it_is_process_0_says(slow):
    cfg = config(checkpoint_minutes=1.0)

    def due(index):
        clock = Clock()
        saver = Saver(cfg, Kept(), Kept(), clock)
        clock.now = 0 if index == slow else 61
        return [step for step in range(1, 12) if saver.is_due(step)]

    want = [] if slow == 0 else [5, 10]
    assert several_processes.together(due, 0, 1) == [want, want]


def test_a_state_that_a_step_has_spoilt_is_not_saved():
    kept, watch = Kept(), Watch()
    watch.state_is_good = False
    Saver(config(), kept, kept).save(30, None, watch)
    assert kept.steps == []


def test_a_run_keeps_what_its_record_says(quick, quickly, tmp_path):
    fields = ["checkpoint_every=100", "checkpoint_minutes=0", "signal_every=3"]
    fields += ["eval_every=6", "keep_checkpoints=1", "keep_every=9", "keep_best=2"]
    run = override(quick, [f"train.{field}" for field in fields])
    assert train(run, tmp_path / "run") == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    losses = {}
    for path in checkpoints.iterdir():
        losses[int(path.name)] = manifest.read(path).get("validation_loss")
    # Every third step, and the last; every sixth has a loss, and it falls.
    assert losses.keys() == {9, 18, 20}
    assert losses[9] is None and losses[20] < losses[18]
