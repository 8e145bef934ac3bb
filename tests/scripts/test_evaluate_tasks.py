"""scripts/evaluate.py --task: problems, speed and others' tasks, from end to end."""

import json
import re
import shutil

import pytest

from jmoe.checkpoint.workdir import CONFIG

PROBLEMS = [
    {
        "problem": f"The square of {number} is?",
        "answer": str(number**2),
        "subject": "Algebra" if number % 2 else "Geometry",
        "level": 1 + number % 3,
    }
    for number in range(6)
]
MATH500 = ("--task=math500", "--max_new_tokens=8")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PROBLEMS))
    return path


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """The trained run, with as many positions as a problem needs."""
    copy = tmp_path_factory.mktemp("runs") / "longer"
    shutil.copytree(trained, copy)
    config = json.loads((copy / CONFIG).read_text())
    config["model"]["max_positions"] = 256
    (copy / CONFIG).write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def exported(script, workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "hf"
    assert script("export_hf", f"--workdir={workdir}", f"--out={out}").code == 0
    return out


def evaluate(script, *arguments):
    outcome = script("evaluate", *arguments)
    assert outcome.code == 0 and outcome.err == "", outcome
    return outcome.out


def test_problems_are_scored_and_every_answer_is_written(script, workdir, data):
    out = evaluate(script, f"--workdir={workdir}", *MATH500, f"--data={data}")
    for name in ("all", "level 1", "level 2", "level 3", "Algebra", "Geometry"):
        assert re.search(rf"│ {name} +│ +[\d.]+% │ [\d.]+% to [\d.]+% │", out), name
    (path,) = (workdir / "evaluations").glob("math500-*.jsonl")
    assert (
        f"6 answers, 6 without an answer in a box, 6 ended by their length: {path}"
        in (out.replace("\n", ""))
    )
    _, *lines = map(json.loads, path.read_text().splitlines())
    assert sorted(line["name"] for line in lines) == list("123456")
    assert all(line["prompt"].startswith("The square of") for line in lines)


def test_a_rerun_goes_on_and_never_asks_twice(script, workdir, data, tmp_path):
    arguments = (f"--workdir={workdir}", *MATH500, f"--data={data}")
    out = tmp_path / "answers.jsonl"
    first = evaluate(script, *arguments, f"--out={out}", "--limit=2")
    assert "2 answers" in first
    lines = out.read_text().splitlines()
    assert "6 answers" in evaluate(script, *arguments, f"--out={out}")
    assert out.read_text().splitlines()[: len(lines)] == lines
    before = out.read_bytes()
    assert "2 answers" in evaluate(script, *arguments, f"--out={out}", "--limit=2")
    assert out.read_bytes() == before


def test_an_exported_model_answers_as_its_run_does(
    script, workdir, exported, data, tmp_path
):
    texts = []
    for place in (f"--workdir={workdir}", f"--model={exported}"):
        out = tmp_path / f"{len(texts)}.jsonl"
        evaluate(script, place, *MATH500, f"--data={data}", f"--out={out}")
        _, *lines = map(json.loads, out.read_text().splitlines())
        texts.append({line["name"]: line["text"] for line in lines})
    assert texts[0] == texts[1] and len(texts[0]) == 6


def test_speed_is_told_plain_and_with_drafts(script, workdir, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "speed.json"
    prompts.write_text('{"text": "The square of 3"}\n{"text": "is"}\n')
    shown = evaluate(
        script,
        f"--workdir={workdir}",
        *("--task=decoding_speed", f"--data={prompts}", f"--out={out}"),
        *("--max_new_tokens=8", "--concurrency=1"),
    )
    rows = json.loads(out.read_text())["speeds"]
    places = [(row["drafts"], row["requests_at_a_time"]) for row in rows]
    assert places == [(0, 1), (1, 1)]
    assert all(row["tokens"] == 16 and row["tokens_per_second"] > 0 for row in rows)
    assert len(re.findall(r"^│ +[01] │ +1 │", shown, re.M)) == 2


def test_without_the_harness_it_is_told_how_to_get_it(script, workdir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = script("evaluate", f"--workdir={workdir}", "--task=arc_easy")
    assert "task='arc_easy' is none of perplexity, math500, decoding_speed, and" in (
        outcome.mistake()
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--task=math500",), "task='math500' needs --data, a .jsonl file"),
        (("--task=math500", "--data=nothing"), "data='nothing': no such file"),
        (("--data=x.jsonl",), "--data says nothing with the other flags"),
        (("--task=decoding_speed", "--samples=2"), "--samples says nothing"),
        (("--task=math500", "--concurrency=2"), "--concurrency says nothing"),
        ((*MATH500, "--endpoint=http://h/v1", "--weights=fp8"), "--weights says nothi"),
        ((*MATH500, "--data=DATA", "--samples=2"), "samples=2 with temperature=0 are"),
        ((*MATH500, "--data=DATA", "--weights=fp8", "--weights=native"), "one form"),
        ((*MATH500, "--data=DATA", "--temperature=-1"), "temperature=-1.0 must be at"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    script, workdir, data, arguments, complaint
):
    arguments = [each.replace("DATA", str(data)) for each in arguments]
    if not any("endpoint" in each for each in arguments):
        arguments.append(f"--workdir={workdir}")
    assert complaint in script("evaluate", *arguments).mistake()
