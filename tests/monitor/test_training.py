import math

import numpy as np
import pytest
from prometheus_client import parser

from jmoe.monitor.training import TrainingMeter
from tests.monitor.watched import Clock, figure, lines

LOAD_LE = np.array([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])


def make_meter(clock=None, devices=2):
    return TrainingMeter("tiny", 100, devices, device="a CPU", clock=clock or Clock())


def log(meter, step, **changed):
    """Logs a step as the trainer does."""
    metrics = {
        **{"loss": np.float32(2.5), "grad_norm": np.float32(0.5), "skipped": 0},
        **{"learning_rate": np.float32(1e-3), "tokens": step * 256},
        **{"tokens_per_second": 512.0, "step_seconds": 0.5},
        **{"max_vio": 0.3, "max_vio_p50": 0.3, "max_vio_max": 0.6},
        **{"max_vio_L": np.array([0.6, 0.0]), "drop_rate_L": np.zeros(2)},
    }
    meter.log(step, metrics | changed, load_LE=LOAD_LE, bias_LE=0 * LOAD_LE)


def test_before_the_first_log_it_says_that_the_run_compiles():
    snapshot = make_meter().snapshot()
    assert snapshot.status == "compiling · a CPU" and snapshot.load_LE is None
    assert snapshot.to_json()


def test_the_last_log_is_shown_and_how_long_is_left():
    clock = Clock()
    meter = make_meter(clock)
    for step in (10, 20, 30):
        clock.now += 5
        log(meter, step, loss=np.float32(3 - step / 100))
    snapshot = meter.snapshot()
    assert snapshot.status == "step 30 of 100 · 0:00:35 left · a CPU"
    assert figure(snapshot, "training loss")[0] == pytest.approx(2.7)
    assert figure(snapshot, "tokens per second") == (512.0, "7,680 so far")
    assert lines(snapshot, "Loss")["training"] == pytest.approx([2.9, 2.8, 2.7])
    np.testing.assert_allclose(snapshot.max_vio_L, [0.6, 0.0])
    np.testing.assert_allclose(snapshot.device_load_LP, [[1, 1], [1, 1]])


def test_an_evaluation_adds_to_what_is_shown_and_to_the_chart_of_losses():
    meter = make_meter()
    log(meter, 10)
    meter.log(10, {"val_loss": 2.75, "global_max_vio": 0.05})
    log(meter, 20)
    snapshot = meter.snapshot()
    assert figure(snapshot, "validation loss")[0] == 2.75
    assert figure(snapshot, "training loss")[0] == 2.5
    assert lines(snapshot, "Loss")["validation"] == [2.75, None]
    assert lines(snapshot, "Loss")["training"] == [2.5, 2.5]
    np.testing.assert_allclose(snapshot.load_LE, LOAD_LE * 4)


def test_a_run_that_went_back_shows_one_line_and_counts_its_time_anew():
    clock = Clock()
    meter = make_meter(clock)
    for step in (10, 20, 30, 20, 30):
        clock.now += 10
        log(meter, step)
    assert lines(meter.snapshot(), "Loss")["training"] == [2.5] * 3
    assert "0:01:10 left" in meter.snapshot().status


def test_silence_is_suspicious_by_the_pace_of_the_logs():
    clock = Clock()
    meter = make_meter(clock)
    log(meter, 10)
    assert meter.snapshot().patience is None  # it compiles
    clock.now += 60
    log(meter, 20)
    assert meter.snapshot().patience == 600
    meter.finish("complete")
    assert meter.snapshot().patience is None
    assert meter.snapshot().status == "step 20 of 100 · complete · a CPU"


def test_a_loss_that_is_not_finite_is_shown_as_it_is():
    meter = make_meter()
    log(meter, 10)
    log(meter, 20, loss=np.float32(math.nan))
    assert '"training loss","value":"NaN"' in meter.snapshot().to_json()


def test_what_few_runs_have_is_shown_once_there_is_some():
    meter = make_meter()
    log(meter, 10)
    names = {shown.name for shown in meter.snapshot().figures}
    assert not names & {"choices dropped", "experts lent", "steps skipped"}
    lent = {
        "experts_lent_L": np.array([3, 2]),
        "device_max_vio_L": np.array([0.5, 0.1]),
    }
    log(meter, 20, drop_rate_L=np.array([0.0, 0.5]), skipped=3, **lent)
    snapshot = meter.snapshot()
    assert figure(snapshot, "choices dropped")[0] == 0.25
    assert figure(snapshot, "experts lent")[0] == 5
    assert figure(snapshot, "steps skipped")[0] == 3
    above = lines(snapshot, "Busiest device above the mean")
    assert above == {"without lending": [None, pytest.approx(0.3)]}


def test_experts_that_move_are_a_decision_with_its_reason():
    meter = make_meter()
    meter.log(10, {"val_loss": 2.75})
    log(meter, 10)
    moved = {"experts_moved_L": np.array([3, 1])}
    above = {"home_max_vio_L": [0.5, 0.25], "home_max_vio_moved_L": [0.1, 0.05]}
    meter.log(10, moved | above)
    (decision,) = meter.snapshot().decisions
    assert decision.change == "step 10: 4 experts moved to other devices"
    assert "37.5% above the mean" in decision.reason and "7.5%" in decision.reason
    assert lines(meter.snapshot(), "Loss") == {"training": [2.5], "validation": [2.75]}


def test_notes_are_shown_as_what_happened():
    meter = make_meter()
    meter.note("Saved step 10.")
    (note,) = meter.snapshot().decisions
    assert (note.kind, note.change) == ("note", "Saved step 10.")


def test_the_metrics_parse_and_hold_only_what_was_logged():
    meter = make_meter()
    log(meter, 10)
    text = meter.prometheus().decode()
    found = {family.name for family in parser.text_string_to_metric_families(text)}
    assert {"jmoe_train_loss", "jmoe_train_tokens", "jmoe_train_max_vio"} <= found
    assert "jmoe_train_validation_loss" not in found
    assert 'jmoe_train_device_load{device="1",layer="0"} 1.0' in text
    assert 'jmoe_run{device="a CPU",run="tiny"} 1.0' in text
