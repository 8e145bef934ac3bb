"""The dashboard asks only for what there is, and shows all that is worth a look."""

import importlib.resources
import json
import re

import numpy as np
import pytest
from prometheus_client import parser

from jmoe.monitor.decisions import Decision
from tests.monitor.test_training import log
from tests.monitor.test_training import make_meter as make_training_meter
from tests.monitor.watched import make_meter, step

INSTANCE = 'instance=~"$instance"'
WINDOW = "[$__rate_interval]"
SELECTOR = re.compile(r"(jmoe_\w+)\{([^}]*)\}(\[\$__rate_interval\])?")
GROUPED = re.compile(r"\b(?:sum|avg|max|min|quantile) by \(([\w, ]+)\) \(")
FUNCTIONS = {"rate", "increase", "histogram_quantile", "quantile"}
AGGREGATIONS = {"sum", "avg", "max", "by"}
COUNTED = ("_total", "_count", "_bucket")


@pytest.fixture(scope="module")
def dashboard():
    files = importlib.resources.files("jmoe.monitor")
    return json.loads((files / "grafana.json").read_text())


def labels_by_name():
    """Returns all that a server and a run may say, each with its labels."""
    serving, training = make_meter(), make_training_meter()
    step(serving)
    serving.first_token(0.1)
    serving.between_tokens(0.1)
    serving.request_ended("stop", 1)
    serving.refused(429)
    serving.decided(Decision(0.0, "placement", "", ""))
    layers = {"experts_lent_L": np.ones(2), "dead_experts_L": np.ones(2)}
    more = {"val_loss": 1.0, "global_max_vio": 0.1, "bias_rate": 1e-3, "rolled_back": 0}
    log(training, 1, **layers, **more)
    found: dict[str, set[str]] = {}
    for meter in (serving, training):
        text = meter.prometheus().decode()
        for family in parser.text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions(dashboard):
    targets = (panel.get("targets", []) for panel in dashboard["panels"])
    return [target["expr"] for part in targets for target in part]


def argument(expression: str, start: int) -> str:
    """Returns what is between a parenthesis that ends before `start`, and its other."""
    depth = 1
    for at in range(start, len(expression)):
        depth += {"(": 1, ")": -1}.get(expression[at], 0)
        if not depth:
            return expression[start:at]
    raise AssertionError(f"not closed: {expression}")


def test_every_metric_that_is_asked_for_exists_as_a_counter_or_not(dashboard):
    known = labels_by_name()
    for expression in expressions(dashboard):
        selected = SELECTOR.findall(expression)
        names = [name for name, *_ in selected]
        assert names and names == re.findall(r"\bjmoe_\w+", expression), expression
        assert set(names) <= known.keys(), expression
        assert {matchers for _, matchers, _ in selected} == {INSTANCE}, expression
        for name, _, window in selected:  # counters are worth a look as rates only
            assert bool(window) == name.endswith(COUNTED), expression
        rates = re.findall(r"\b(?:rate|increase)\(jmoe_\w+", expression)
        assert len(rates) == expression.count(WINDOW), expression
        called = set(re.findall(r"(\w+) ?\(", SELECTOR.sub("", expression)))
        assert called <= FUNCTIONS | AGGREGATIONS, expression
    chosen = json.dumps(dashboard["templating"])
    assert set(re.findall(r"\bjmoe_\w+", chosen)) <= known.keys()


def test_every_label_that_is_asked_for_is_one_of_its_metrics(dashboard):
    known = labels_by_name()
    targets = (x for panel in dashboard["panels"] for x in panel.get("targets", []))
    for target in targets:
        expression, kept = target["expr"], set()
        for found in GROUPED.finditer(expression):
            labels = set(re.split(", ?", found[1]))
            kept |= labels
            for name, *_ in SELECTOR.findall(argument(expression, found.end())):
                assert labels <= known[name], expression
        assert expression.count("by (") == len(GROUPED.findall(expression))
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert named <= kept, expression
        is_histogram = "histogram_quantile" in expression
        assert is_histogram == ("le" in kept) == ("_bucket{" in expression)


def test_the_dashboard_is_as_grafana_documents_its_own(dashboard):
    """By "Dashboard JSON model" in Grafana's documentation, and kinds/dashboard."""
    assert isinstance(dashboard["schemaVersion"], int) and "id" not in dashboard
    assert 8 <= len(dashboard["uid"]) <= 40 and dashboard["editable"] is True
    assert dashboard["timezone"] in ("browser", "utc")
    assert re.fullmatch(r"\d+[smhd]", dashboard["refresh"])
    assert dashboard["time"].keys() == {"from", "to"}
    source, chosen = dashboard["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert source["name"] == "datasource" and chosen["name"] == "instance"
    assert chosen["type"] == "query" and chosen["refresh"] in (1, 2)
    assert chosen["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    values = re.compile(r"label_values\((.+), ([a-zA-Z_]\w*)\)")
    assert values.fullmatch(chosen["query"]["query"])[2] == "instance"
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            assert panel["panels"] == [] and panel["collapsed"] is False
            continue
        assert panel["type"] == "timeseries" and panel["fieldConfig"]["defaults"]
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters)


def test_nearly_all_metrics_are_on_the_dashboard(dashboard):
    shown = set(re.findall(r"\bjmoe_\w+", json.dumps(dashboard)))
    ends = re.compile("_(bucket|count|sum|created)$")
    missing = {ends.sub("", name) for name in labels_by_name()} - {
        ends.sub("", name) for name in shown
    }
    assert missing == {
        *("jmoe_answered_tokens_total", "jmoe_requests_admitted_total"),
        *("jmoe_train_tokens_total", "jmoe_train_step_seconds"),
        *("jmoe_train_skipped_steps", "jmoe_train_roll_backs"),
        "jmoe_train_dead_experts",
    }


def test_panels_lie_side_by_side_and_know_their_source(dashboard):
    taken = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
