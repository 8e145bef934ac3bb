"""Speeds from the times at which tokens came, and an engine measured for real."""

import json

import numpy as np
import pytest

from jmoe.decode.requests import Completion, Sampling
from jmoe.evals import decoding_speed


def completion(**options):
    return Completion(0, accepted=[], **options)


def test_quantiles_are_of_first_tokens_and_of_waits_between_tokens():
    done = [
        completion(tokens=[5] * 4, times=[0.1, 0.2, 0.3, 0.4], steps=3),
        completion(tokens=[5] * 3, times=[0.3, 0.5, 0.7], steps=2),
        completion(tokens=[5], times=[0.2], steps=0),
        completion(tokens=[], times=[], steps=0),
    ]
    speed = decoding_speed.summarize(done, seconds=2.0)
    assert (speed.requests, speed.tokens, speed.tokens_per_second) == (3, 8, 4.0)
    assert speed.first.median == pytest.approx(0.2)
    assert speed.first.p99 == pytest.approx(np.quantile([0.1, 0.2, 0.3], 0.99))
    assert speed.between.median == pytest.approx(0.1)
    assert speed.between.p99 == pytest.approx(0.2)
    assert (speed.acceptance, speed.tokens_a_step) == ((), 1.0)


def test_acceptance_is_by_the_drafts_place():
    done = [
        Completion(0, tokens=[1] * 8, times=[0.1] * 8, steps=4, accepted=[2, 1]),
        Completion(1, tokens=[1] * 5, times=[0.1] * 5, steps=4, accepted=[0, 0]),
    ]
    speed = decoding_speed.summarize(done, seconds=1.0)
    assert speed.acceptance == (0.25, 0.125)
    assert speed.tokens_a_step == 1.375
    assert speed.between.median == 0.0


def test_one_token_a_request_has_no_wait_between():
    speed = decoding_speed.summarize([completion(tokens=[1], times=[0.1])], 1.0)
    assert speed.between == (0.0, 0.0)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_an_engine_is_measured_by_the_tokens_it_makes(
    cfg, variables, tokenizer, one_by_one, tmp_path
):
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": "abc"}, {"statement": "What is it? " * 50, "id": 3}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = decoding_speed.read_prompts(path, tokenizer, most=20)
    assert [len(prompt) for prompt in prompts] == [4, 20]
    engine = decoding_speed.make_engine(
        cfg, variables, prompts, new_tokens=6, at_a_time=1, drafts=1
    )
    sampling = Sampling(max_new_tokens=6)
    speed = decoding_speed.measure(engine, prompts, sampling, one_by_one=one_by_one)
    assert (speed.requests, speed.tokens) == (2, 12)
    assert 0 < speed.first.median <= speed.first.p99 < speed.seconds
    assert len(speed.acceptance) == 1 and 1 <= speed.tokens_a_step <= 2


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"body": "x"}, "record 1: no text in any of"),
        ({"text": 3}, "no text in"),
    ],
)
def test_a_record_without_a_prompt_is_refused(tokenizer, tmp_path, record, complaint):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=complaint):
        decoding_speed.read_prompts(path, tokenizer, most=20)


def test_what_cannot_be_measured_is_refused(cfg, variables):
    with pytest.raises(ValueError, match="no prompts"):
        decoding_speed.measure(None, [], Sampling())
    with pytest.raises(ValueError, match="No token came"):
        decoding_speed.summarize([completion()], 1.0)
    with pytest.raises(ValueError, match="Prompt 0: too long"):
        decoding_speed.summarize([completion(error="too long")], 1.0)
