"""scripts/evaluate.py: held-out perplexity of a run, with its weights in fewer bits."""

import math
import re

import jax
import pytest

from jmoe.evals.perplexity import perplexity
from jmoe.monitor import run_files
from jmoe.train import compiled
from jmoe.train.trained import load_trained


@pytest.fixture(scope="module")
def loaded(trained):
    return load_trained(trained)


def test_native_weights_have_the_validation_loss_of_training(trained, loaded):
    (want,) = run_files.read_run(trained).last("val_loss")
    got = perplexity(loaded)
    assert math.isclose(got.loss, want, rel_tol=1e-5)
    run = loaded.run
    of_a_batch = run.train.microbatch_size * run.data.sequence_length
    assert got.tokens == run.train.eval_batches * of_a_batch


@pytest.mark.parametrize("form", ["fp8", "int4-experts"])
def test_fewer_bits_cost_less_than_a_percent(loaded, form):
    native, small = perplexity(loaded), perplexity(loaded, form)
    assert abs(small.perplexity / native.perplexity - 1) < 0.01
    assert small.loss != native.loss
    assert small.weight_bytes < 0.6 * native.weight_bytes


def test_an_evaluation_first_frees_programs_that_are_too_many(
    loaded, tmp_path, monkeypatch
):
    other = jax.jit(lambda x: 2 * x)
    other(1)
    monkeypatch.setattr(compiled, "LIMIT", tmp_path / "max_map_count")
    compiled.LIMIT.write_text("100")
    perplexity(loaded)
    assert other._cache_size() == 0


def test_all_forms_are_shown_side_by_side(script, trained):
    outcome = script("evaluate", f"--workdir={trained}")
    assert outcome.code == 0 and outcome.err == ""
    rows = re.findall(r"│ (native|fp8|int4-experts) .*?([+-][\d.]+)%", outcome.out)
    assert [name for name, _ in rows] == ["native", "fp8", "int4-experts"]
    assert float(rows[0][1]) == 0.0


def test_a_run_is_evaluated_on_as_much_text_as_is_asked_for(script, trained):
    options = ("--weights=fp8", "--set=train.eval_batches=1")
    outcomes = [
        script("evaluate", f"--workdir={trained}", *options, f"--step={step}")
        for step in (20, 40, "best")
    ]
    for outcome in outcomes:
        assert outcome.code == 0 and "128 tokens" in outcome.out
        assert "native" not in outcome.out
    assert outcomes[0].out != outcomes[1].out == outcomes[2].out


def test_of_a_run_in_fp8_it_shows_what_the_range_loses(script, trained):
    options = ("--weights=native", "--set=precision=fp8", "--set=train.eval_batches=1")
    outcome = script("evaluate", f"--workdir={trained}", *options)
    assert outcome.code == 0 and outcome.err == ""
    assert re.search(r"│ moe/moe/experts +│ act +│ +[\d.]+% │ +[\d.]+% │", outcome.out)


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--weights=int3", "weights='int3' is not one of native, fp8, int4-experts"),
        ("--workdir=nowhere", "'nowhere' holds no run"),
        ("--step=7", "No checkpoint of step 7"),
        ("--step=1.5", "step='1.5' must be a step's number or 'best'"),
        ("--set=model.num_layers=4", "model.num_layers=4 must stay 2"),
        ("--set=data.tokenizer=other.json", "data.tokenizer='other.json' must stay"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(script, trained, argument, complaint):
    outcome = script("evaluate", f"--workdir={trained}", argument)
    assert complaint in outcome.mistake()
