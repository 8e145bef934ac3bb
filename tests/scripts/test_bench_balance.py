"""The benchmark of balance plans loans for the routings that it says."""

import json

import numpy as np
import pytest

from experiments.benchmarks import balance, balance_lending
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.balance_routings import KINDS, SHAPES, TOKENS, routings
from experiments.benchmarks.report import Figure


@pytest.fixture(scope="module")
def given():
    return list(routings(draws=1))


def test_every_token_makes_its_choices_of_distinct_experts(given):
    assert len(given) == len(SHAPES) * len(KINDS)
    for kind, shape, load_PE in given:
        assert load_PE.shape == (shape.devices, shape.experts)
        assert (load_PE.sum(1) == TOKENS * shape.top_k).all()
        assert load_PE.max() <= TOKENS
        hosted_E = np.arange(shape.experts) < shape.hosted
        if kind == "one expert":
            assert (load_PE[:, 0] == TOKENS).all()
        if kind == "one device":
            most = min(shape.top_k, shape.hosted) * TOKENS
            assert (load_PE[:, hosted_E].sum(1) == most).all()


def test_figures_are_of_all_routings_and_hold_them_to_what_is_asked(given):
    uneven = [routing for routing in given if routing.shape.experts == 16]
    results = {
        name: [
            balance_lending.lend(routing, slots(routing.shape)) for routing in uneven
        ]
        for name, slots in balance_lending.SLOTS.items()
    }
    few = results["1"]
    results["4"] = [results["4"][0]._replace(after=0.02)] + few[1:]
    found = {figure.name: figure for figure in balance_lending.figures(results)}
    worst = found["busiest device above the mean, slots: 4, worst routing"]
    assert worst.met is False
    assert worst.value == pytest.approx(100 * max(0.02, *(x.after for x in few[1:])))
    assert found["rows that nobody computes"].met
    assert found["rows of the busiest device above the idlest's, worst routing"].met


def test_a_part_is_measured_by_itself_and_the_others_stay(monkeypatch, tmp_path):
    value = 1.0

    def part(rounds, say):
        figure = Figure(name="a", value=value, unit="", definition="", at_most=1.5)
        return Part([figure], {"rounds": rounds}, {}, ("wrong",) * (value > 1.5))

    monkeypatch.setattr(balance, "PARTS", {"one": part, "other": part})

    def measure(*parts):
        settings = balance.Settings(parts=parts)
        reports = balance.run(3, lambda text: None, settings)
        found = json.loads(reports.write(tmp_path).read_text())["parts"]
        return reports.wrong, {x: found[x]["figures"][0]["value"] for x in found}

    assert measure("other") == ((), {"other": 1.0})
    value = 2.0
    assert measure("one") == (("wrong",), {"one": 2.0, "other": 1.0})
    with pytest.raises(ValueError, match="part 'third'; known: one, other"):
        balance.Settings(parts=("one", "third"))
