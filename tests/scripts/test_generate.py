"""scripts/generate.py: the continuation of a prompt, or one line that says why not."""

import io
import json
import pathlib
import shutil
import sys

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
        ("--max_new_tokens=64", "make 65 positions; there are 64"),
        ("--max_new_tokens=0", "max_new_tokens=0 must be at least 1"),
        ("--temperature=-1", "temperature=-1.0 must be at least 0"),
        ("--top_p=0", "top_p=0.0 must be above 0"),
        ("--top_k=-1", "top_k=-1 must be at least 0"),
        ("--min_p=2", "min_p=2.0 must be at least 0 and at most 1"),
        ("--repetition_penalty=0", "repetition_penalty=0.0 must be above 0"),
        ("--stop=", "stop_texts must not hold an empty text"),
        ("--stop=\udcff", "stop=.* must be UTF-8"),
        ("--set=pages=3", "Unknown field 'pages'"),
        ("--prompts={}/nowhere", "prompts='.*nowhere' is not a file"),
        ("--model={}", "exclude each other"),
        ("--output={}/new", "--output is for what becomes of --prompts"),
        ("--prompt=ab\udcff", "prompt=.* must be UTF-8"),
        ("--workdir=gs://bucket/run", "workdir=.* must be a path of this machine"),
        ("--weights=int3", "'int3' is not one of native, fp8, int4-experts"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(script, trained, argument, complaint):
    outcome = script("generate", f"--workdir={trained}", argument.format(trained))
    assert_mistake(outcome, complaint)


def test_a_limit_that_the_model_does_not_have_is_refused(script, trained):
    options = (f"--workdir={trained}", *GREEDY, "--set=max_length=65")
    complaint = "max_length=65 must be at most the model's max_positions=64"
    assert_mistake(script("generate", *options), complaint)


def test_what_excludes_each_other_is_refused(script, trained):
    for one, other in (
        ("--prompt=a", "--prompts=b"),
        ("--prompts=b", "--interactive"),
        ("--model=a", "--step=3"),
        ("--model=a", "--workdir=b"),
    ):
        names = [flag.partition("=")[0] for flag in (one, other)]
        outcome = script("generate", one, other)
        assert_mistake(outcome, f"{names[0]} and {names[1]} exclude each other")


def test_a_stop_text_ends_the_text_before_it(script, trained):
    options = (f"--workdir={trained}", f"--prompt={PROMPT}", *GREEDY)
    whole = script("generate", *options).out
    stop = whole[len(PROMPT) + 6 :][:3]
    cut = script("generate", *options, f"--stop={stop}").out
    assert cut == whole[: whole.index(stop, len(PROMPT))] + "\n"


def test_drafts_change_no_text_and_are_reported(script, trained):
    options = (f"--workdir={trained}", f"--prompt={PROMPT}", *GREEDY)
    outcome = script("generate", *options, "--drafts=1")
    assert outcome.out == script("generate", *options).out
    assert "drafts right: " in outcome.err and "tokens a step" in outcome.err


def test_each_line_of_a_file_gets_its_completion_beside_its_fields(
    script, trained, tmp_path
):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "done.jsonl"
    rows = [
        {"id": "a", "prompt": PROMPT},
        {"prompt": "much too long " * 9},
        {"prompt": "The"},
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    options = (f"--workdir={trained}", *GREEDY, f"--prompts={prompts}")
    outcome = script("generate", *options, f"--output={output}")
    assert (outcome.code, outcome.out) == (2, "")
    assert "error: 1 of 3 completions failed" in outcome.err
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert found[0]["id"] == "a" and found[1]["finish_reason"] == "error"
    assert "positions; there are 64" in found[1]["error"]
    for row in (found[0], found[2]):
        alone = script("generate", *options[:3], f"--prompt={row['prompt']}").out
        assert alone == row["prompt"] + row["completion"] + "\n"
        assert row["num_tokens"] == 20 and row["finish_reason"] == "length"
    again = script("generate", *options, f"--output={output}")
    assert_mistake(again, "output='.*done.jsonl' exists already")


def test_samples_of_lines_are_printed_in_order(script, trained, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The\n\nis\n")
    options = (f"--workdir={trained}", f"--prompts={prompts}", "--num_samples=2")
    outcome = script("generate", *options, "--max_new_tokens=5", "--temperature=2")
    assert outcome.code == 0 and "20 tokens in " in outcome.err
    found = [json.loads(line) for line in outcome.out.splitlines()]
    assert [(row["prompt"], row["sample"]) for row in found] == [
        ("The", 0),
        ("The", 1),
        ("is", 0),
        ("is", 1),
    ]
    assert len({row["completion"] for row in found}) == 4


def test_lines_that_are_piped_are_completed_one_after_the_other(
    script, trained, monkeypatch
):
    options = (f"--workdir={trained}", *GREEDY)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n\nThe\n"))
    outcome = script("generate", *options, "--interactive")
    assert outcome.code == 0 and outcome.err == ""
    alone = [
        script("generate", *options, f"--prompt={prompt}").out
        for prompt in (PROMPT, "The")
    ]
    assert outcome.out == "".join(alone)


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
