"""The placement part of the suite `balance`, and the rule that it compares with."""

import json

import numpy as np

from experiments.benchmarks import balance_placement as bench
from experiments.benchmarks import eplb


def test_the_rule_gives_what_its_authors_publish_for_their_example():
    got_LR = [eplb.rule(load_E, 16, 4, 2, 8) for load_E in bench.EXAMPLE_LE.tolist()]
    np.testing.assert_array_equal(
        got_LR,
        [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ],
    )


def test_figures_are_json_and_no_placement_is_below_the_mean_or_above_the_rule():
    load_LE = np.random.default_rng(0).random((2, 64))
    balance = bench.balance_of(load_LE, bench.SMALL)
    assert 1 <= balance["ours"] <= balance["eplb"] <= balance["unaware"]
    assert balance["most_above_eplb"] <= 1e-9
    drift = bench.after_drift(load_LE, bench.SMALL)
    assert 0 < drift["moves"] <= 0.3 * drift["moves_from_scratch"]
    assert drift["balance_after"] <= 1.05 * drift["balance_from_scratch"] + 1e-9
    json.dumps([balance, drift, bench.forecasts()])
    found = {"balance": {"a": balance}, "drift": {"a": drift}}
    found |= {"recorded": {}, "seconds": {}}
    assert [figure.met for figure in bench.figures(found)] == [True, True]
    found["balance"]["a"] |= {"most_above_eplb": 0.01}
    found["drift"]["a"] |= {"moves_of_those_from_scratch": 0.31}
    assert [figure.met for figure in bench.figures(found)] == [False, False]


def test_what_stays_busy_is_balanced_over_time_with_few_moves():
    rng = np.random.default_rng(0)
    rate_LE = rng.dirichlet(np.ones(32), 2)
    found = bench.over_time(rng.multinomial(4096, rate_LE, size=(30, 2)))
    assert found["ours"]["balance"] < found["eplb"]["balance"]
    assert found["eplb"]["balance"] < found["unaware"]["balance"]
    assert found["ours"]["moves"] < 0.1 < found["eplb"]["moves"]
    assert found["unaware"]["moves"] == 0
