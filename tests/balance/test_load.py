"""Load metrics against their definitions, at their extremes and without any load."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import load

COUNTS = st.lists(st.integers(0, 10**6), min_size=4, max_size=4).filter(any)
metrics = jax.jit(load.load_metrics)
EXAMPLES = settings(deadline=None, max_examples=25)


@EXAMPLES
@given(
    st.lists(COUNTS, min_size=1, max_size=3).filter(lambda rows: all(map(sum, rows)))
)
def test_max_violation_is_the_papers_formula_averaged_over_layers(rows):
    naive = np.mean([(max(row) - sum(row) / 4) / (sum(row) / 4) for row in rows])
    got = load.max_violation(np.array(rows, np.int32))
    np.testing.assert_allclose(got, naive, rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(COUNTS, st.permutations(range(4)), st.integers(2, 9))
def test_violation_and_entropy_ignore_the_order_and_the_size_of_the_batch(
    row, order, factor
):
    row = np.array(row)
    before, after = metrics(row, 0), metrics(row[list(order)] * factor, 0)
    for name in ("max_vio", "load_entropy"):
        np.testing.assert_allclose(before[name], after[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_experts", [2, 7, 64])
def test_the_extremes_are_balance_and_a_single_busy_expert(num_experts):
    load_LE = np.stack([np.full(num_experts, 9), 9 * np.eye(num_experts, dtype=int)[1]])
    got = metrics(load_LE, np.array([0, 9]))
    np.testing.assert_allclose(got["max_vio"], [0, num_experts - 1], atol=1e-6)
    np.testing.assert_allclose(got["load_entropy"], [1, 0], atol=1e-6)
    np.testing.assert_array_equal(got["dead_experts"], [0, num_experts - 1])
    np.testing.assert_array_equal(got["drop_rate"], [0, 1])


def test_a_layer_without_load_counts_as_balanced_but_dead():
    got = metrics(np.zeros((1, 4), np.int32), np.zeros(1, np.int32))
    assert {name: float(value[0]) for name, value in got.items()} == {
        "max_vio": 0.0,
        "load_entropy": 1.0,
        "dead_experts": 4.0,
        "drop_rate": 0.0,
    }


@EXAMPLES
@given(st.lists(st.floats(0, 255, width=32), min_size=1, max_size=61))
def test_percentiles_over_layers_are_interpolated_between_the_sorted_values(values):
    ordered = sorted(values)

    def naive(share):
        at = share * (len(values) - 1)
        low, high = (ordered[round_(at)] for round_ in (math.floor, math.ceil))
        return low + (at - math.floor(at)) * (high - low)

    got = load.percentiles("max_vio", np.float32(values))
    want = {"max_vio_p50": 0.5, "max_vio_p95": 0.95, "max_vio_max": 1.0}
    assert got == pytest.approx({k: naive(share) for k, share in want.items()})
    assert got["max_vio_max"] == max(values)


def test_global_violation_hides_the_noise_that_batch_violation_shows():
    batches_NLE = np.random.default_rng(0).multinomial(64, [1 / 8] * 8, size=(500, 1))
    assert load.max_violation(batches_NLE) > 0.3  # the mean over the batches, too
    assert load.max_violation(batches_NLE.sum(0)) < 0.05


def test_counts_beyond_int32_are_summed_without_overflow():
    load_LE = np.full((1, 4), 2**31 - 1)
    load_LE[0, 0] = 0
    np.testing.assert_allclose(load.max_violation(load_LE), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(
        load.load_metrics(load_LE, np.array([2**31 - 1]))["drop_rate"], 1 / 3, rtol=1e-6
    )


def test_a_lone_expert_is_balanced():
    got = metrics(np.array([[5]]), np.array([0]))
    assert float(got["max_vio"][0]) == 0 and float(got["load_entropy"][0]) == 1


def test_metrics_are_the_same_under_jit_and_hold_one_value_a_layer():
    load_LE, dropped_L = np.array([[3, 0, 5], [1, 1, 1]]), np.array([2, 0])
    eager, jitted = load.load_metrics(load_LE, dropped_L), metrics(load_LE, dropped_L)
    assert set(eager) == {"max_vio", "load_entropy", "dead_experts", "drop_rate"}
    for name, value_L in eager.items():
        assert value_L.shape == (2,)
        np.testing.assert_allclose(jitted[name], value_L, rtol=1e-6, atol=1e-7)
