"""Steps that must not count: what they leave, how they are told, and when to stop."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmoe.config import TrainConfig, override
from jmoe.train import guard
from jmoe.train import layout as layouts
from jmoe.train.guard import ENOUGH, LAG, Guard
from tests.train.training import Trainer, batch, on, random_variables


def config(on_nonfinite="skip", **settings) -> TrainConfig:
    settings["on_nonfinite"] = on_nonfinite
    return TrainConfig(steps=1000, batch_size=1, microbatch_size=1, **settings)


def measured(loss=2.0, *, skipped=False, norm=1.0) -> dict[str, jax.Array]:
    return {
        "skipped": jnp.int32(skipped),
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(norm),
    }


NOT_FINITE = measured(math.nan, skipped=True, norm=math.nan)
SPIKE = measured(9.0, skipped=True)


def watch(outcomes, saved=None, **settings) -> tuple[Guard, list[str]]:
    """A guard that has seen all of these, from step 1 on, and what it said."""
    said = []
    watching = Guard(config(**settings), saved, said.append)
    for step, outcome in enumerate(outcomes, start=1):
        watching.add(step, outcome, 8 * step)
    watching.catch_up()
    return watching, said


@pytest.fixture(scope="module", params=["", "data=2,expert=4,tensor=2", "muon"])
def trainer(request, smallest) -> Trainer:
    mesh, name = ("", "muon") if request.param == "muon" else (request.param, "adamw")
    settings = ["train.ramp_start=none", "train.microbatch_size=8"]
    settings.append("train.on_nonfinite=skip")
    settings.append(f"optimizer.name={name}")
    run = on(smallest, mesh, *settings)
    return Trainer.of(run, random_variables(run))


@pytest.mark.parametrize(
    ("cause", "scale"), [("loss", 1e38), ("norm", 1e37), ("spike", 1.0)]
)
def test_a_step_that_must_not_count_changes_nothing_but_counters_of_steps(
    trainer, cause, scale
):
    rows = [layouts.put_batch(trainer.layout, batch(trainer.run, i)) for i in (0, 1)]
    finite, none = layouts.put_whole(trainer.layout, np.float32([math.inf, 0]))
    state, _ = trainer.step(trainer.state, rows[0], finite)
    head = state.params["head"] * scale  # finite, but its logits or gradients aren't
    state = state.replace(params={**state.params, "head": head})
    limit = none if cause == "spike" else finite
    after, metrics = trainer.step(state, rows[1], limit)
    assert metrics["skipped"] == 1
    assert np.isfinite(metrics["loss"]) == (cause != "loss")
    assert np.isfinite(metrics["grad_norm"]) == (cause == "spike")
    assert same(after.replace(step=state.step), state, but=optax.ScaleByScheduleState)
    assert (state.step, after.step) == (1, 2)
    counts = [x.count for x in jax.tree.leaves(after, is_leaf=schedule) if schedule(x)]
    assert counts and all(count == 2 for count in counts)


def schedule(x) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)


def same(got, want, *, but) -> bool:
    """Whether all is the same to the bit, except nodes of one class."""
    equal = jax.tree.map(
        lambda g, w: isinstance(g, but) or np.array_equal(g, w),
        got,
        want,
        is_leaf=lambda x: isinstance(x, but),
    )
    return all(jax.tree.leaves(equal))


def test_what_was_skipped_is_counted_and_the_first_in_a_row_is_said():
    outcomes = [measured(), NOT_FINITE, NOT_FINITE, measured(), SPIKE]
    watching, said = watch(outcomes)
    assert (watching.skipped, watching.verdict) == (3, None)
    assert said == [
        "Step 2 skipped: loss or gradients aren't finite (loss nan, norm nan).",
        "Step 5 skipped: the loss is a spike (loss 9, norm 1).",
    ]


def test_too_many_in_a_row_end_the_run_and_as_many_with_one_between_do_not():
    row = [NOT_FINITE, NOT_FINITE, SPIKE]
    watching, _ = watch([measured(), *row[:2], measured(), *row[1:]], max_skipped=3)
    assert watching.verdict is None
    watching, _ = watch([measured(), *row], max_skipped=3)
    assert "Step 4" in watching.verdict
    assert "3 in a row, train.max_skipped" in watching.verdict


@pytest.mark.parametrize(
    ("field", "outcome"), [("on_nonfinite", NOT_FINITE), ("on_spike", SPIKE)]
)
def test_a_policy_to_stop_ends_the_run_at_the_first(field, outcome):
    watching, _ = watch([measured(), outcome], **{field: "stop"})
    assert f"train.{field}='stop'" in watching.verdict
    other = {"on_nonfinite": "on_spike", "on_spike": "on_nonfinite"}[field]
    watching, _ = watch([measured(), outcome], **{other: "stop"})
    assert watching.verdict is None


@pytest.mark.parametrize(
    ("field", "outcome"), [("on_nonfinite", NOT_FINITE), ("on_spike", SPIKE)]
)
def test_a_policy_to_roll_back_tells_the_step_and_where_its_data_ended(field, outcome):
    policies = {"on_nonfinite": "stop", "on_spike": "stop"} | {field: "roll_back"}
    outcomes = [
        measured(),
        outcome,
        *[NOT_FINITE, SPIKE] * 3,
    ]  # all from a spoilt state
    watching, said = watch(outcomes, **policies)
    assert watching.spoilt[:2] == (2, 16)
    assert watching.spoilt.reason.startswith("Step 2: ")
    assert (watching.verdict, watching.skipped, said) == (None, 0, [])
    assert not watching.goes_on and not watching.state_is_good


def test_what_ends_a_run_comes_before_what_it_would_go_back_from():
    watching, _ = watch([NOT_FINITE, SPIKE], on_nonfinite="stop", on_spike="roll_back")
    assert "Step 1" in watching.verdict and watching.spoilt is None


@pytest.mark.parametrize(("policy", "is_good"), [("skip", True), ("stop", False)])
def test_a_state_is_good_after_a_verdict_if_steps_are_skipped(policy, is_good):
    watching, _ = watch([NOT_FINITE], on_nonfinite=policy, max_skipped=1)
    assert watching.verdict and watching.state_is_good == is_good
    assert watch([measured()], on_nonfinite=policy)[0].state_is_good


def noisy(count: int) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    falling = 3 * np.exp(-np.arange(count) / 50) + 2
    return [measured(loss) for loss in falling + 0.05 * rng.normal(size=count)]


def test_a_spike_is_above_the_limit_and_noise_is_not():
    losses, limits = noisy(300), []
    watching = Guard(config(on_spike="skip"), None, print)
    for step, outcome in enumerate(losses, start=1):
        limits.append(watching.loss_limit())
        watching.add(step, outcome, 8 * step)
    known = ENOUGH + LAG
    assert np.isinf(limits[:known]).all() and np.isfinite(limits[known:]).all()
    assert all(limit > x["loss"] for limit, x in zip(limits, losses, strict=True))
    assert limits[-1] < losses[-1]["loss"] + 1
    assert watch(losses)[0].loss_limit() is None  # spikes are ignored by default


def test_a_limit_depends_neither_on_when_losses_are_read_nor_on_a_resume():
    losses, limits = noisy(80), ([], [])
    steady = Guard(config(on_spike="skip"), None, print)
    resumed = Guard(config(on_spike="skip"), None, print)
    for step, outcome in enumerate([*losses[:50], NOT_FINITE, *losses[50:]], start=1):
        for watching, found in zip((steady, resumed), limits, strict=True):
            found.append(watching.loss_limit())
            watching.add(step, outcome, 8 * step)
        if step % 7 == 0:
            saved = json.loads(json.dumps(resumed.state(), allow_nan=False))
            resumed = Guard(config(on_spike="skip"), saved, print)
    assert limits[0] == limits[1]
    assert steady.state() == resumed.state()


def test_arrays_that_are_not_finite_are_named():
    arrays = {"a": jnp.ones(3), "b": {"c": jnp.array([1, jnp.inf])}, "n": jnp.int32(1)}
    with pytest.raises(ValueError, match="^there has NaN or infinite numbers in b/c;"):
        guard.require_finite(arrays, "there")
    guard.require_finite({name: arrays[name] for name in "an"}, "there")


@pytest.mark.parametrize(
    "setting",
    ["on_spike=go_back", "on_nonfinite=ignore", "max_skipped=0", "spike_score=-1"],
)
def test_a_policy_that_is_none_is_refused(smallest, setting):
    field = setting.partition("=")[0]
    with pytest.raises(ValueError, match=field):
        override(smallest, [f"train.{setting}"])
