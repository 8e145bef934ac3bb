"""Rates and sizes at the steps where they turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.config import (
    RunConfig,
    ScheduleConfig,
    StepwiseConfig,
    TrainConfig,
    override,
)
from jmoe.config.train import MOST_SIZES
from jmoe.train.schedules import (
    SCHEDULES,
    bias_rates,
    learning_rate,
    microbatches,
    stepwise,
)

PEAK = 2.2e-4


def rates(steps: int, at: list[int], **fields) -> list[float]:
    schedule = learning_rate(ScheduleConfig(peak=PEAK, **fields), steps)
    return [float(schedule(jnp.int32(step))) for step in at]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_linearly_from_0_to_its_peak(name):
    got = rates(1000, [0, 1, 50, 99, 100], name=name, warmup_steps=100)
    np.testing.assert_allclose(got, PEAK * np.array([0, 0.01, 0.5, 0.99, 1]), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_every_schedule_begins_at_its_peak(name):
    np.testing.assert_allclose(rates(1000, [0], name=name), [PEAK], rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 200])
def test_a_constant_rate_stays(warmup_steps):
    got = rates(1000, [200, 999], name="constant", warmup_steps=warmup_steps)
    np.testing.assert_allclose(got, [PEAK, PEAK], rtol=1e-6)


def test_a_cosine_falls_to_its_end_over_what_the_warm_up_leaves():
    at = [200, 400, 600, 999, 1000, 2000]
    got = rates(1000, at, name="cosine", warmup_steps=200, end_fraction=0.1)
    done = np.array([0, 0.25, 0.5, 799 / 800, 799 / 800, 799 / 800])
    want = PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("warmup_steps", [0, 200])
def test_wsd_falls_linearly_in_the_last_part_of_the_run(warmup_steps):
    fields = {"warmup_steps": warmup_steps, "decay_fraction": 0.2, "end_fraction": 0.1}
    got = rates(1000, [200, 800, 900, 999, 1000], name="wsd", **fields)
    end = 0.1 + 0.9 / 200
    want = PEAK * np.array([1, 1, 0.55, end, end])
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("warmup_steps", [0, 200])
def test_v3_turns_after_10_and_14_3_and_14_63_of_14_8_trillion_tokens(warmup_steps):
    # In steps of a billion tokens; the fractions have three digits.
    at = [9_990, 10_010, 12_150, 14_280, 14_310, 14_630, 14_650, 14_799]
    got = rates(14_800, at, name="multi_step", warmup_steps=warmup_steps)
    middle = (2.2e-4 + 2.2e-5) / 2
    want = [2.2e-4, 2.2e-4, middle, 2.2e-5, 2.2e-5, 2.2e-5, 7.3e-6, 7.3e-6]
    np.testing.assert_allclose(got, want, rtol=2e-3)
    assert got[0] == np.float32(2.2e-4) > got[1]


def test_a_stepwise_value_changes_at_its_switch_and_takes_a_traced_step():
    value = jax.jit(stepwise(StepwiseConfig(first=0.3, last=0.1, switch=0.25), 12))
    got = [value(jnp.int32(step)) for step in (0, 2, 3, 11)]
    assert got == [np.float32(x) for x in (0.3, 0.3, 0.1, 0.1)]
    assert got[0].dtype == jnp.float32


def test_a_layers_bias_rate_is_by_the_last_pattern_that_matches_its_name(smallest):
    run = override(
        smallest,
        [
            "model.num_layers=13",
            "train.bias_rate={'first': 0.5, 'last': 0.25, 'switch': 0.5}",
            "train.bias_rate_factors=[{'layers': 'moe_?', 'factor': 0},"
            "{'layers': '*_[03]', 'factor': 2}, {'layers': 'mtp_*', 'factor': 0.5}]",
        ],
    )
    rates = jax.jit(bias_rates(run.train, run.model.moe_layer_names, 12))
    factor_L = [2, 0, 0, 2, *[0] * 6, 1, 1, 0.5]  # moe_0 to moe_11, mtp_0
    for step, rate in ((5, 0.5), (6, 0.25)):
        np.testing.assert_array_equal(
            rates(jnp.int32(step))[:, 0], rate * np.float32(factor_L)
        )


def test_without_factors_all_layers_have_the_bias_rate(smallest):
    train, layers = smallest.train, smallest.model.moe_layer_names
    got = bias_rates(train, layers, 14_800)(jnp.int32(0))
    assert (
        got.tolist() == [[np.float32(1e-3)]] * len(layers) and got.dtype == jnp.float32
    )


@pytest.mark.parametrize("switch", [0.0, 0.5, 1.0])
def test_beyond_its_horizon_a_value_stays_what_it_was_at_the_last_step(switch):
    value = stepwise(StepwiseConfig(first=0.3, last=0.1, switch=switch), 12)
    want = np.float32(0.3 if switch == 1 else 0.1)
    assert [value(jnp.int32(step)) for step in (11, 12, 13, 10_000)] == [want] * 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_beyond_its_horizon_the_rate_stays_what_it_was_at_the_last_step(name):
    last, *beyond = rates(1000, [999, 1000, 1001, 50_000], name=name, warmup_steps=9)
    assert beyond == [last] * 3


def test_v3s_bias_rate_and_mtp_weight_are_the_defaults(smallest):
    train = smallest.train
    bias_rate = stepwise(train.bias_rate, 14_800)
    mtp_weight = stepwise(train.mtp_weight, 14_800)
    assert [bias_rate(14_290), bias_rate(14_300)] == [np.float32(1e-3), 0]
    assert [mtp_weight(9_990), mtp_weight(10_010)] == [np.float32(0.3), np.float32(0.1)]


@pytest.fixture
def ramp(smallest) -> RunConfig:
    """From 4 to 16 sequences in 12 steps, in microbatches of 2."""
    return override(
        smallest,
        [
            "train.microbatch_size=2",
            "train.batch_size=16",
            "train.ramp_start=4",
            "train.ramp_steps=12",
        ],
    )


def test_a_batch_grows_by_equal_steps_to_its_full_size(ramp):
    got = [microbatches(ramp.train, step) for step in range(15)]
    assert got == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 8]


def test_an_increment_makes_fewer_sizes(ramp):
    train = dataclasses.replace(ramp.train, ramp_increment=4)
    got = [microbatches(train, step) for step in range(15)]
    assert got == [2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6, 8, 8, 8]


@given(
    first=st.integers(1, 40),
    grown=st.integers(1, 60),
    increment=st.none() | st.integers(9, 30),
    steps=st.integers(1, 200),
)
def test_a_ramp_follows_its_line_in_at_most_eight_sizes(first, grown, increment, steps):
    cfg = TrainConfig(
        steps=500,
        microbatch_size=2,
        batch_size=2 * (first + grown),
        ramp_start=2 * first,
        ramp_steps=steps,
        ramp_increment=increment and 2 * increment,
    )
    got = [microbatches(cfg, step) for step in range(steps + 3)]
    assert list(dict.fromkeys(got)) == list(cfg.ramp.values()) == sorted(set(got))
    assert len(set(got)) <= MOST_SIZES
    by = increment or -(-grown // (MOST_SIZES - 1))
    for step, count in enumerate(got[:steps]):
        line = first + grown * step / steps
        assert count <= line < count + by and (count - first) % by == 0
    assert got[steps:] == [first + grown] * 3


def test_without_a_ramp_every_batch_is_full(ramp):
    train = dataclasses.replace(ramp.train, ramp_start=None)
    assert [microbatches(train, step) for step in (0, 5, 20)] == [8, 8, 8]
