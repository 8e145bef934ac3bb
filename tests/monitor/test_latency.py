import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jmoe.monitor import latency
from jmoe.monitor.latency import Durations


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    st.lists(st.floats(0.001, 10.0), min_size=1, max_size=50), st.floats(0.01, 1.0)
)
def test_a_quantile_lies_between_the_bounds_around_the_exact_one(values, q):
    durations = Durations(latency.STEP)
    for value in values:
        durations.add(value)
    exact = np.quantile(values, q, method="inverted_cdf")
    bounds = np.array([0.0, *latency.STEP])
    at = np.searchsorted(bounds, exact)
    assert bounds[at - 1] <= durations.quantile(q) <= bounds[at]


def test_bounds_lie_so_close_that_a_quantile_is_off_by_little():
    ratios = np.divide(latency.FIRST_TOKEN[1:], latency.FIRST_TOKEN[:-1])
    assert ratios.min() > 1.3 and ratios.max() < 1.7
    assert latency.FIRST_TOKEN[0] == 0.01 and latency.FIRST_TOKEN[-1] == 100.0


def test_what_exceeds_all_bounds_counts_as_the_last():
    durations = Durations(latency.BETWEEN_TOKENS)
    durations.add(1000.0)
    assert durations.quantile(0.5) == latency.BETWEEN_TOKENS[-1]
    assert durations.total == 1000.0


def test_no_durations_have_no_quantile():
    assert Durations(latency.STEP).quantile(0.5) is None


def test_several_durations_at_once_are_as_many_apart():
    once, apart = Durations(latency.STEP), Durations(latency.STEP)
    once.add(0.02, times=3)
    for _ in range(3):
        apart.add(0.02)
    np.testing.assert_array_equal(once.count_B, apart.count_B)
    assert once.total == pytest.approx(apart.total)


def test_since_counts_only_what_came_later():
    before, later = Durations(latency.STEP), Durations(latency.STEP)
    for durations in (before, later):
        durations.add(0.002)
    later.add(3.0)
    assert later.since(before).count_B.sum() == 1
    assert later.since(before).quantile(0.5) > 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0432, "43.2 ms"), (1.2345, "1.23 s"), (0.0, "0 ms")]
)
def test_a_duration_in_words(seconds, text):
    assert latency.seconds(seconds) == text
