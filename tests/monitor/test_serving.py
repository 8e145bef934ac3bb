import sys
import threading

import numpy as np
import pytest

from jmoe.monitor.decisions import Decision
from tests.monitor.watched import (
    DEVICES,
    EXPERTS,
    LAYERS,
    Clock,
    figure,
    lines,
    make_meter,
    step,
)

SKEWED_LE = np.array([[8, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])


def test_rates_are_of_the_last_seconds_and_totals_of_all_time():
    clock = Clock()
    meter = make_meter(clock)
    for _ in range(100):
        clock.now += 1.0
        step(meter, new_tokens=3, prompt_tokens=50)
    rate, note = figure(meter.snapshot(), "tokens per second")
    assert rate == pytest.approx(3, rel=0.15) and note == "300 since the start"
    rate, _ = figure(meter.snapshot(), "prompt tokens per second")
    assert rate == pytest.approx(50, rel=0.15)
    clock.now += 60
    assert figure(meter.snapshot(), "tokens per second")[0] == 0


def test_a_server_that_has_just_begun_has_the_rate_of_its_few_seconds():
    clock = Clock()
    meter = make_meter(clock)
    for _ in range(4):
        clock.now += 1.0
        step(meter, new_tokens=10)
    assert figure(meter.snapshot(), "tokens per second")[0] == 10


def test_load_is_of_the_last_minute_and_stays_while_nothing_happens():
    clock = Clock()
    meter = make_meter(clock)
    step(meter)
    clock.now += 100
    step(meter, count_LE=SKEWED_LE)
    clock.now += 500
    snapshot = meter.snapshot()
    np.testing.assert_allclose(snapshot.load_LE, SKEWED_LE * [[1], [1]])
    np.testing.assert_allclose(snapshot.max_vio_L, [7, 0])
    assert "8 choices a layer" in snapshot.load_note
    assert figure(snapshot, "MaxVio") == (3.5, "layer 0 has 7.00")


def test_devices_compute_what_they_are_said_to_or_else_their_own_experts():
    meter = make_meter()
    step(meter, count_LE=SKEWED_LE)
    np.testing.assert_allclose(
        meter.snapshot().device_load_LP, [[4, 0, 0, 0], [1, 1, 1, 1]]
    )
    lent_LP = np.full((LAYERS, DEVICES), 2)
    meter = make_meter()
    step(meter, count_LE=SKEWED_LE, device_LP=lent_LP)
    np.testing.assert_allclose(meter.snapshot().device_load_LP, np.ones((2, 4)))


def test_latencies_are_of_the_last_minute():
    clock = Clock()
    meter = make_meter(clock)
    meter.first_token(50.0)
    clock.now += 120
    for _ in range(10):
        meter.first_token(0.2)
        meter.between_tokens(0.06, tokens=2)
    median, p99 = figure(meter.snapshot(), "time to first token")
    assert 0.15 <= median <= 0.2 and p99 == "p99 200 ms"
    median, _ = figure(meter.snapshot(), "time between tokens")
    assert 0.02 <= median <= 0.03
    assert meter.totals().first_token.count_B.sum() == 11


def test_balance_over_time_shows_when_it_was_lost():
    clock = Clock()
    meter = make_meter(clock)
    for at in range(60):
        clock.now += 5.0
        step(meter, count_LE=SKEWED_LE if at > 30 else np.ones((2, 8), int))
    worst = lines(meter.snapshot(), "Balance: MaxVio")["worst layer"]
    worst = worst[1:]  # the first part begins before the first step
    assert worst[5] == 0 and worst[-1] == 7
    assert all(later >= vio for vio, later in zip(worst[:-1], worst[1:], strict=True))


def test_a_long_step_is_no_end_of_its_requests():
    clock = Clock()
    meter = make_meter(clock)
    step(meter, live=5)
    clock.now += 30
    snapshot = meter.snapshot()
    assert lines(snapshot, "Requests")["running"][-5:] == [5] * 5
    assert lines(snapshot, "Tokens per second")["new"][-5:] == [0] * 5


def test_silence_is_suspicious_only_while_requests_run():
    clock = Clock()
    meter = make_meter(clock)
    assert meter.snapshot().status == "idle" and meter.snapshot().patience is None
    step(meter, live=2, waiting=1)
    clock.now += 300
    snapshot = meter.snapshot()
    assert snapshot.status == "2 running, 1 waiting"
    assert snapshot.patience is not None
    assert clock.now - snapshot.time > snapshot.patience
    step(meter, live=0)
    assert meter.snapshot().time == clock.now and meter.snapshot().patience is None


def test_history_is_bounded():
    clock = Clock()
    meter = make_meter(clock)
    for _ in range(2000):
        clock.now += 5.0
        step(meter)
    points = lines(meter.snapshot(), "Tokens per second")["new"]
    assert len(points) == 180
    assert len(meter._recent._parts) == 180
    assert len(meter.snapshot().to_json()) < 30_000


def test_what_few_servers_have_is_shown_once_there_is_some():
    meter = make_meter()
    step(meter)
    names = {shown.name for shown in meter.snapshot().figures}
    few = {"drafts accepted", "choices dropped", "experts moved", "experts lent"}
    assert not names & {*few, "steps in FP8"}
    dropped_L = np.array([1, 3])
    step(meter, drafted=4, accepted=3, dropped_L=dropped_L, lent=2, in_fp8=True)
    meter.moved(5)
    snapshot = meter.snapshot()
    assert figure(snapshot, "drafts accepted")[0] == 0.75
    assert figure(snapshot, "choices dropped")[0] == 4 / 32
    assert figure(snapshot, "experts moved")[0] == 5
    assert figure(snapshot, "experts lent")[0] == 2
    assert figure(snapshot, "steps in FP8") == (1 / 2, "tokens travel so now")
    step(meter)
    assert figure(meter.snapshot(), "steps in FP8") == (1 / 3, "not now")


def test_decisions_are_shown():
    meter = make_meter()
    decision = Decision(1.0, "placement", "MaxVio 0.6", "3 experts moved")
    meter.decided(decision)
    assert meter.snapshot().decisions == (decision,)


def test_threads_lose_no_count_while_others_read():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        let_threads_report()
    finally:
        sys.setswitchinterval(before)


def let_threads_report():
    meter = make_meter()

    def report():
        for _ in range(200):
            step(meter, new_tokens=1)
            meter.between_tokens(0.01)
            meter.request_ended("stop", 1)

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        totals = meter.totals()
        assert totals.count_LE.sum() == totals.new_tokens * LAYERS * EXPERTS
        assert meter.snapshot().to_json() and meter.prometheus()
    for thread in threads:
        thread.join()
    assert meter.totals().new_tokens == meter.totals().ended["stop"] == 800


def test_devices_that_cannot_share_the_experts_are_refused():
    with pytest.raises(ValueError, match="num_devices=3 must divide num_experts=8"):
        make_meter(devices=3)
