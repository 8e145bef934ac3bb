import pytest

from jmoe.monitor.vllm import VllmMeter, read
from tests.monitor.watched import Clock, figure, lines

BOUNDS = (0.01, 0.1, 1.0)


def page(*, new=0, prompt=0, running=0, waiting=0, firsts=(), drafts=(0, 0), engines=1):
    """Returns what engines say, each that it did the same."""
    text = []
    for engine in range(engines):
        labels = f'engine="{engine}",model_name="tiny"'
        values = {
            **{"generation_tokens_total": new, "prompt_tokens_total": prompt},
            **{"num_requests_running": running, "num_requests_waiting": waiting},
            **{"kv_cache_usage_perc": 0.25 + engine / 4},
            "spec_decode_num_draft_tokens_total": drafts[0],
            "spec_decode_num_accepted_tokens_total": drafts[1],
        }
        text += [f"vllm:{name}{{{labels}}} {value}" for name, value in values.items()]
        for bound in (*BOUNDS, float("inf")):
            below = sum(seconds <= bound for seconds in firsts)
            le = "+Inf" if bound == float("inf") else bound
            name = "vllm:time_to_first_token_seconds_bucket"
            text.append(f'{name}{{{labels},le="{le}"}} {below}')
    return "\n".join(text) + "\n"


def test_rates_are_the_difference_of_two_readings():
    clock = Clock()
    meter = VllmMeter(clock=clock)
    for second in range(20):
        meter.add(page(new=second * 30, prompt=second * 100, running=4, waiting=1))
        clock.now += 1
    snapshot = meter.snapshot()
    assert (snapshot.kind, snapshot.model) == ("vllm", "tiny")
    assert snapshot.status == "4 running, 1 waiting"
    assert figure(snapshot, "tokens per second") == (30, "570 since the start")
    assert figure(snapshot, "prompt tokens per second")[0] == 100
    assert lines(snapshot, "Tokens per second")["new"] == [30] * 19
    assert snapshot.load_LE is None and snapshot.to_json()


def test_engines_behind_one_address_count_as_one():
    reading = read(page(new=7, running=2, firsts=(0.05, 0.5), engines=3), 0.0)
    assert reading.counts["new"] == 21 and reading.gauges["running"] == 6
    assert reading.durations["first_token"].count_B.tolist() == [0, 3, 3, 0]
    assert reading.cache == 0.75  # the fullest


def test_latencies_and_drafts_are_of_the_last_minute():
    clock = Clock()
    meter = VllmMeter(clock=clock)
    meter.add(page(firsts=(0.005,) * 100, drafts=(100, 100)))
    clock.now += 30
    meter.add(page(firsts=(*(0.005,) * 100, 0.5), drafts=(110, 104)))
    snapshot = meter.snapshot()
    assert 0.1 < figure(snapshot, "time to first token")[0] < 1
    assert figure(snapshot, "drafts accepted") == (0.4, "94.5% since the start")


def test_a_server_that_began_again_has_no_negative_rates():
    clock = Clock()
    meter = VllmMeter(clock=clock)
    for new in (1000, 2000, 50, 60):
        meter.add(page(new=new))
        clock.now += 1
    assert lines(meter.snapshot(), "Tokens per second")["new"] == [10]


def test_before_the_first_reading_it_says_so():
    assert VllmMeter().snapshot().status == "no metrics yet"
    meter = VllmMeter(clock=Clock())
    meter.add(page())
    assert figure(meter.snapshot(), "tokens per second")[0] is None
    assert meter.prometheus().decode() == page()


@pytest.mark.parametrize("text", ["", "other_metric 1\n", "<!doctype html>\n"])
def test_what_is_not_vllms_is_refused(text):
    with pytest.raises(ValueError, match="vLLM|vllm|Prometheus"):
        read(text, 0.0)
