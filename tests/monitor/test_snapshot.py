import json
import math

import numpy as np
import pytest

from jmoe.balance import load
from jmoe.monitor.decisions import Decision, Decisions
from jmoe.monitor.snapshot import (
    Chart,
    Figure,
    Snapshot,
    device_load,
    even_share,
    max_violation_L,
)

COUNT_LE = np.array([[3, 1, 0, 4], [2, 2, 2, 2], [0, 0, 0, 0]])


def parsed(**fields):
    snapshot = Snapshot(kind="serving", model="m", time=0.0, status="", **fields)
    return json.loads(snapshot.to_json())


def test_arrays_charts_and_decisions_become_plain_json():
    found = parsed(
        load_LE=np.array([[0.5, 1.5]]),
        charts=[Chart("MaxVio", "", "time", [1.0], {"worst": [np.float32(0.25)]})],
        decisions=[Decision(1.0, "placement", "skewed", "moved")],
    )
    assert found["load_LE"] == [[0.5, 1.5]]
    assert found["charts"][0]["lines"] == {"worst": [0.25]}
    assert found["decisions"][0]["change"] == "moved"
    assert found["device_load_LP"] is None


def test_what_is_not_finite_is_still_json_and_a_figure_says_it():
    figures = [
        Figure("loss", math.nan),
        Figure("norm", math.inf),
        Figure("tokens", None),
    ]
    found = parsed(
        figures=figures, charts=[Chart("", "", "step", [1], {"loss": [math.nan]})]
    )
    assert [f["value"] for f in found["figures"]] == ["NaN", "Infinity", None]
    assert found["charts"][0]["lines"]["loss"] == [None]


def test_times_of_this_century_keep_their_seconds():
    found = Snapshot(kind="vllm", model="", time=1795998895.44, status="")
    assert json.loads(found.to_json())["time"] == 1795998895.44


def test_a_kind_that_the_page_does_not_know_is_refused():
    with pytest.raises(ValueError, match="kind='server' is not one of serving"):
        Snapshot(kind="server", model="", time=0.0, status="")


def test_violation_on_the_host_is_that_of_the_devices():
    found_L = max_violation_L(even_share(COUNT_LE))
    np.testing.assert_allclose(found_L, load.max_violation_L(COUNT_LE))


def test_devices_hold_consecutive_experts_and_their_loads_average_one():
    device_LP = device_load(even_share(COUNT_LE), 2)
    np.testing.assert_allclose(device_LP, [[1, 1], [1, 1], [0, 0]])
    skewed_LP = device_load(even_share(np.array([[4, 2, 1, 1]])), 2)
    np.testing.assert_allclose(skewed_LP, [[1.5, 0.5]])


def test_the_latest_decisions_are_kept_and_all_are_counted():
    decisions = Decisions()
    for i in range(250):
        decisions.add(Decision(float(i), "placement" if i % 2 else "admission", "", ""))
    assert [d.time for d in decisions.latest()] == list(range(150, 250))
    assert decisions.counts() == {"admission": 125, "placement": 125}
