import numpy as np

from jmoe.monitor.thinned import Thinned


def test_any_number_of_points_is_thinned_to_a_bound_evenly():
    history = Thinned(limit=40)
    for step in range(1, 5001):
        history.add(step, step * 2)
    points = history.points()
    assert 20 <= len(points) <= 41
    assert points[0] == (1, 2) and points[-1] == (5000, 10_000)
    gaps = np.diff([step for step, _ in points])
    assert len(set(gaps[:-1])) == 1


def test_few_points_are_all_there():
    history = Thinned(limit=40)
    for step in (10, 20, 30):
        history.add(step, str(step))
    assert history.points() == [(10, "10"), (20, "20"), (30, "30")]


def test_a_run_that_goes_back_forgets_what_came_after():
    history = Thinned()
    for step in (10, 20, 30, 20):
        history.add(step, f"at {step}")
    assert history.points() == [(10, "at 10"), (20, "at 20")]


def test_nothing_is_empty():
    assert Thinned().points() == []
