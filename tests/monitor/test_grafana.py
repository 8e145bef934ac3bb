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

OF_PROMETHEUS = {"instance", "le"}  # labels that are there without us


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


def test_every_metric_and_label_that_is_asked_for_exists(dashboard):
    known = labels_by_name()
    for expression in expressions(dashboard):
        names = re.findall(r"\bjmoe_\w+", expression)
        assert names and set(names) <= known.keys(), expression
        grouped = re.findall(r"by \((\w+)\)", expression)
        labels = set.union(OF_PROMETHEUS, *(known[name] for name in names))
        assert set(grouped) <= labels, expression
    chosen = json.dumps(dashboard["templating"])
    assert set(re.findall(r"\bjmoe_\w+", chosen)) <= known.keys()


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
