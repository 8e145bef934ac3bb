"""scripts/generate.py: the continuation of a prompt, or one line that says why not."""

import pathlib
import shutil

import pytest

from jmoe.decode.generate import generate
from jmoe.train.trained import load_trained

PROMPT = "The square of "
GREEDY = ("--temperature=0", "--max_new_tokens=20")


def test_a_prompt_is_completed_by_the_runs_model(script, trained):
    outcome = script("generate", f"--workdir={trained}", f"--prompt={PROMPT}", *GREEDY)
    assert outcome.code == 0 and outcome.err == ""
    run, tokenizer, variables, step = load_trained(trained)
    assert step == 40
    eos = tokenizer.eos_id
    (new,) = generate(
        run.model,
        variables,
        [[eos, *tokenizer.encode(PROMPT)]],
        max_new_tokens=20,
        stop_ids=(eos,),
    )
    assert outcome.out == PROMPT + tokenizer.decode(new) + "\n"
    assert "is" in outcome.out  # what the text has after every number


def test_samples_differ_from_each_other_and_follow_from_the_seed(script, trained):
    def draw(seed: int) -> list[str]:
        options = ("--num_samples=2", "--max_new_tokens=20", "--temperature=2")
        outcome = script(
            "generate",
            f"--workdir={trained}",
            "--prompt=The",
            f"--seed={seed}",
            *options,
        )
        assert outcome.code == 0
        return outcome.out.split("-" * 40 + "\n")

    first = draw(1)
    assert len(set(first)) == 2 and all(text.startswith("The") for text in first)
    assert draw(1) == first
    assert draw(2) != first


def test_an_empty_prompt_begins_a_document(script, trained):
    outcome = script("generate", f"--workdir={trained}", *GREEDY)
    assert outcome.code == 0
    assert outcome.out.startswith("The")


def test_weights_in_fewer_bits_complete_it_too(script, trained):
    options = (f"--workdir={trained}", f"--prompt={PROMPT}", *GREEDY)
    for form in ("fp8", "int4-experts"):
        outcome = script("generate", *options, f"--weights={form}")
        assert outcome.code == 0 and "is" in outcome.out.removeprefix(PROMPT)


def test_an_earlier_checkpoint_can_be_asked_for(script, trained):
    texts = {
        script("generate", f"--workdir={trained}", f"--step={step}", *GREEDY).out
        for step in (20, 40)
    }
    assert len(texts) == 2


def test_the_best_checkpoint_by_validation_can_be_asked_for(script, copied):
    before = script("generate", f"--workdir={copied}", "--step=20", *GREEDY)
    best = (f"--workdir={copied}", "--step=best", *GREEDY)
    assert script("generate", *best).out != before.out  # that of step 40 is better
    shutil.rmtree(copied / "checkpoints" / "40")
    assert script("generate", *best).out == before.out


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--workdir={}/nowhere", "nowhere' holds no run: it has no config.json"),
        ("--step=7", "No checkpoint of step 7 in .*; found: 40, 20"),
        ("--step=newest", "step='newest' must be a step's number or 'best'"),
        ("--max_new_tokens=64", "positions; the model has max_positions=64"),
        ("--max_new_tokens=0", "max_new_tokens=0 must be at least 1"),
        ("--temperature=-1", "temperature=-1.0 must be at least 0"),
        ("--top_p=0", "top_p=0.0 above 0"),
        ("--prompt=ab\udcff", "prompt=.* must be UTF-8"),
        ("--workdir=gs://bucket/run", "workdir=.* must be a path of this machine"),
        ("--weights=int3", "'int3' is not one of native, fp8, int4-experts"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(script, trained, argument, complaint):
    outcome = script("generate", f"--workdir={trained}", argument.format(trained))
    assert_mistake(outcome, complaint)


def assert_mistake(outcome, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        raise ValueError(outcome.mistake())


@pytest.fixture
def copied(trained, tmp_path) -> pathlib.Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_without_a_checkpoint_has_no_model(script, copied):
    shutil.rmtree(copied / "checkpoints")
    outcome = script("generate", f"--workdir={copied}")
    assert_mistake(outcome, "No whole checkpoint in .*checkpoints")


def test_a_damaged_checkpoint_is_named_when_asked_for_and_else_passed_over(
    script, copied, caplog
):
    arrays = max((copied / "checkpoints" / "40").rglob("d/*"), key=_size)
    arrays.write_bytes(arrays.read_bytes()[:-1])
    outcome = script("generate", f"--workdir={copied}", "--step=40")
    assert_mistake(outcome, "checkpoints/40 is damaged: .* bytes, not")
    older = script("generate", f"--workdir={copied}", *GREEDY)
    assert older.code == 0 and "Passed over" in caplog.text
    same = script("generate", f"--workdir={copied}", "--step=20", *GREEDY)
    assert older.out == same.out


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size
