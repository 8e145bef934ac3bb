import numpy as np
from prometheus_client import parser

from jmoe.monitor.decisions import Decision
from tests.monitor.watched import make_meter, step


def samples(meter):
    """Returns the value of every sample, by its name and its labels in their order."""
    families = parser.text_string_to_metric_families(meter.prometheus().decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_page_parses_and_says_what_was_counted():
    meter = make_meter()
    count_LE = np.arange(16).reshape(2, 8)
    step(meter, new_tokens=7, prompt_tokens=11, count_LE=count_LE, waiting=3)
    meter.request_started()
    meter.request_ended("stop", 9)
    meter.refused(429)
    meter.refused(429)
    meter.decided(Decision(0.0, "placement", "", ""))
    found = samples(meter)
    assert found["jmoe_model", "tiny"] == 1
    assert found["jmoe_new_tokens_total",] == 7
    assert found["jmoe_prompt_tokens_total",] == 11
    assert found["jmoe_requests_waiting",] == 3
    assert found["jmoe_requests_ended_total", "stop"] == 1
    assert found["jmoe_answered_tokens_total",] == 9
    assert found["jmoe_requests_refused_total", "429"] == 2
    assert found["jmoe_decisions_total", "placement"] == 1
    assert found["jmoe_expert_choices_total", "3", "1"] == 14 + 15
    assert found["jmoe_max_vio", "0"] == 1.0


def test_histograms_count_up_to_each_bound():
    meter = make_meter()
    for seconds in (0.02, 0.02, 3.0):
        meter.first_token(seconds)
    found = samples(meter)
    name = "jmoe_time_to_first_token_seconds"
    assert found[f"{name}_bucket", "0.015"] == 0
    assert found[f"{name}_bucket", "0.02"] == 2
    assert found[f"{name}_bucket", "3.0"] == found[f"{name}_bucket", "+Inf"] == 3
    assert found[f"{name}_count",] == 3
    assert abs(found[f"{name}_sum",] - 3.04) < 1e-9


def test_counters_never_fall():
    meter = make_meter()
    before = samples(meter)
    for _ in range(3):
        step(meter, dropped_L=np.array([1, 0]), lent=1, in_fp8=True)
        now = samples(meter)
        counters = [key for key in before if key[0].endswith(("_total", "_count"))]
        assert counters and all(now[key] >= before[key] for key in counters)
        before = now


def test_a_big_model_has_one_series_a_layer_and_device_and_not_one_an_expert():
    meter = make_meter(layers=58, experts=256, devices=16)
    step(meter, count_LE=np.ones((58, 256), int))
    found = samples(meter)
    assert sum(key[0] == "jmoe_expert_choices_total" for key in found) == 58 * 16
    assert len(found) < 1300
