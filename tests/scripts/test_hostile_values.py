"""Every flag of every program, given what it can't use: one line, and nothing else.

A flag that is new belongs in the table; `test_every_flag_is_tried` says so.
"""

import json
import os
import pathlib
from collections.abc import Iterator

import pytest

from tests import test_layout

ROOT = pathlib.Path(__file__).parents[2]
NOT_UTF8 = os.fsdecode(b"\xff")

# What no path can be, and what none is here.
NO_PATH = ["", "gs://bucket/x", "~nobody-here/x", "a\0b", NOT_UTF8]
NO_NEW = [*NO_PATH, "x" * 5000, "file/below", "/dev/null/x"]
PATHS = [*NO_NEW, "nothing", "a\nb"]
INTEGERS = ["", "x", "1.5", "nan", "-1", "9" * 30, "9" * 5000]
NUMBERS = ["", "x", "nan", "inf", "-1", "1e400"]
NAMES = ["", "x", "a\nb", "\0", NOT_UTF8]
SETTINGS = [
    *("", "x", "=1", "nosuch=1", "a\nb=1", "a\0=1", "train=1", "train.steps="),
    *("train.steps=-1", "train.steps=1e400", "train.steps=None", "train.steps=True"),
    *("train.steps=" + "9" * 5000, "train.seed=" + "[" * 5000),
    *("name=", "name=../x", "name='a\\nb'", f"name={NOT_UTF8}"),
    *("model.moe.router={'x': 1}", "model.vocab_size=" + "9" * 12),
]

# A program, arguments beside which only the flag is wrong, the flag, what it is given.
SMALLEST, TRAINED, EXPORTED = "smallest run", "trained run", "exported run"
NEW = f"--experiment={ROOT / 'tests' / 'smallest_run.py'}", "--workdir=new"
TWO = (*NEW, "--num_processes=2", "--process_id=0")
OLD = (f"--workdir={TRAINED}",)
OWN = (f"--model={TRAINED}", "--engine=jax", "--local")
MATH = ("--task=math500", "--data=problems.jsonl")
NO_SERVER = "http://127.0.0.1:9/v1"
SCHEDULES = ("schedules", "--pp=2", "--schedule=interleaved_1f1b")
# Where pip would install gigabytes is left out.
UNTRIED = {("check_hopper", "environment")}
TABLE = {
    ("train", "experiment"): ((), [*PATHS, "dir", "dir.py", "file", "no.json"]),
    ("train", "workdir"): (NEW[:1], [*NO_NEW, "dir", "file"]),
    ("train", "set"): (NEW, SETTINGS),
    ("train", "coordinator"): (TWO, ["a", ":1", "a:0", "a:99999", "a:x", "[::1", "\n"]),
    ("train", "num_processes"): (NEW, INTEGERS),
    ("train", "process_id"): (
        (*NEW, "--coordinator=a:1", "--num_processes=2"),
        INTEGERS,
    ),
    ("evaluate", "workdir"): ((), [*PATHS, "dir", "file"]),
    ("evaluate", "step"): (OLD, INTEGERS),
    ("evaluate", "weights"): (OLD, ["", "a\nb"]),
    # Here few: what is checked once the weights are read takes its time.
    ("evaluate", "set"): (OLD, ["x", "nosuch=1"]),
    ("evaluate", "model"): ((), [*PATHS, "dir", "file"]),
    ("evaluate", "task"): (OLD, [*NAMES, "nothing.yaml", "dir", "https://h/x.yaml"]),
    ("evaluate", "data"): ((*OLD, *MATH), [*PATHS, "dir", "file"]),
    ("evaluate", "limit"): ((*OLD, *MATH), ["", "x", "1.5", "nan", "-1", "0"]),
    ("evaluate", "samples"): ((*OLD, *MATH), [*INTEGERS, "0", "2"]),
    ("evaluate", "temperature"): ((*OLD, *MATH), NUMBERS),
    ("evaluate", "max_new_tokens"): ((*OLD, *MATH), ["", "x", "1.5", "-1", "0"]),
    ("evaluate", "seed"): ((*OLD, *MATH), INTEGERS),
    ("evaluate", "out"): ((*OLD, *MATH), [*NO_NEW, "dir", "file"]),
    ("evaluate", "endpoint"): (MATH, [*NAMES, "localhost:8000", "gs://bucket/v1"]),
    ("evaluate", "endpoint_model"): ((*OLD, *MATH), NAMES[1:]),
    ("evaluate", "endpoint_api"): ((*MATH, f"--endpoint={NO_SERVER}"), NAMES),
    ("evaluate", "concurrency"): ((*OLD, *MATH), [*INTEGERS, "0"]),
    ("generate", "workdir"): ((), [*PATHS, "dir", "file"]),
    ("generate", "step"): (OLD, INTEGERS),
    ("generate", "prompt"): (OLD, [NOT_UTF8, "x" * 1000]),
    ("generate", "num_samples"): (OLD, [*INTEGERS, "0", "1000000000"]),
    ("generate", "max_new_tokens"): (OLD, [*INTEGERS, "1000000000"]),
    ("generate", "temperature"): ((*OLD, "--max_new_tokens=1"), ["x", "nan", "inf"]),
    ("generate", "top_p"): ((*OLD, "--max_new_tokens=1"), ["x", "nan", "-1"]),
    ("generate", "weights"): (OLD, ["", "a\nb"]),
    ("generate", "seed"): (OLD, INTEGERS),
    ("generate", "model"): ((), [*PATHS, "dir", "file"]),
    ("generate", "prompts"): (OLD, [*PATHS, "dir", "empty"]),
    ("generate", "interactive"): (OLD, ["", "x", "2"]),
    ("generate", "output"): ((*OLD, "--prompts=file"), [*NO_NEW, "dir", "file"]),
    ("generate", "top_k"): (OLD, INTEGERS),
    ("generate", "min_p"): (OLD, [*NUMBERS, "2"]),
    ("generate", "repetition_penalty"): (OLD, [*NUMBERS, "0"]),
    ("generate", "stop"): (OLD, ["", NOT_UTF8]),
    ("generate", "drafts"): (OLD, [*INTEGERS, "1000000000"]),
    ("generate", "set"): (OLD, ["", "x", "=1", "nosuch=1", "rows=-1", "drafts=1"]),
    ("export_hf", "workdir"): (("--out=new",), [*PATHS, "dir", "file"]),
    ("export_hf", "out"): (OLD, [*NO_NEW, "dir", "file"]),
    ("export_hf", "step"): ((*OLD, "--out=new"), INTEGERS),
    ("export_hf", "dtype"): ((*OLD, "--out=new"), NAMES),
    ("export_hf", "format"): ((*OLD, "--out=new"), NAMES),
    ("export_hf", "shard_gb"): ((*OLD, "--out=new"), [*NUMBERS, "0"]),
    ("export_hf", "dry_run"): ((*OLD, "--out=new"), ["", "x", "2"]),
    ("export_hf", "model"): (("--dry_run",), NAMES),
    ("import_hf", "model"): (("--workdir=new",), [*PATHS, "dir", "file"]),
    ("import_hf", "workdir"): ((f"--model={EXPORTED}",), [*NO_NEW, "dir", "file"]),
    ("import_hf", "dtype"): ((f"--model={EXPORTED}", "--workdir=new"), NAMES),
    ("import_hf", "fp8"): ((f"--model={EXPORTED}", "--workdir=new"), NAMES),
    ("import_hf", "set"): ((f"--model={EXPORTED}", "--workdir=new"), SETTINGS),
    ("plan", "pp"): (("schedules",), [*INTEGERS, "0", "1000000000"]),
    ("plan", "microbatches"): (SCHEDULES, [*INTEGERS, "0", "1000000000"]),
    ("plan", "schedule"): (("schedules",), NAMES),
    ("plan", "chunks"): (SCHEDULES, [*INTEGERS, "0", "1000000000"]),
    ("plan", "costs"): (
        SCHEDULES,
        [*(f"forward={x}" for x in [*NUMBERS, "1e999999999"]), "x=1", "=1", "forward"],
    ),
    ("plan", "out"): (SCHEDULES, [*PATHS, "dir.svg", "nothing/x.svg", "a.jpeg"]),
    ("plan", "model"): (("memory",), NAMES),
    ("plan", "weights"): (("memory", "--model=tiny"), ["", "a\nb"]),
    ("serve", "model"): ((), [*PATHS, "dir", "file"]),
    ("serve", "engine"): ((f"--model={EXPORTED}",), NAMES),
    ("serve", "mtp"): ((f"--model={EXPORTED}",), ["", "x", "2"]),
    ("serve", "local"): ((f"--model={EXPORTED}",), ["", "x", "2"]),
    ("serve", "step"): (OWN, INTEGERS),
    ("serve", "coordinator"): (
        (*OWN, "--num_processes=2", "--process_id=0"),
        ["a", ":1", "a:0", "a:99999", "a:x", "[::1", "\n"],
    ),
    ("serve", "num_processes"): (OWN, INTEGERS),
    ("serve", "process_id"): (
        (*OWN, "--coordinator=a:1", "--num_processes=2"),
        INTEGERS,
    ),
    ("serve", "set"): (
        (f"--model={EXPORTED}",),
        ["", "x", "=1", "nosuch=1", "port=-1", "port=1e400", "engine=1", "name=\n"],
    ),
    ("monitor", "workdir"): ((), NO_PATH),
    ("monitor", "endpoint"): ((), ["", "x", "ftp://host", "http://", "http://h:x"]),
    ("monitor", "set"): (
        OLD,
        ["", "x", "=1", "nosuch=1", "port=-1", "port=1e400", "host=\n"],
    ),
    ("bench", "suite"): ((), NAMES),
    ("bench", "repeats"): (("--suite=train_cpu",), ["", "x", "1.5", "-1", "0"]),
    ("bench", "set"): (("--suite=faults",), ["", "x", "=1", "nosuch=1", "kills=-1"]),
    ("check_hopper", "suite"): ((), NAMES),
    ("check_hopper", "program"): ((), NAMES),
}


def test_every_flag_is_tried():
    programs = {
        (pathlib.Path(path).stem, flag)
        for path, names in test_layout.FLAGS.items()
        if not path.startswith("experiments/")
        for flag in names
    }
    assert set(TABLE) | UNTRIED == programs


@pytest.fixture
def places(trained, exported, tmp_path, monkeypatch) -> dict[str, str]:
    """Where the words of the table are; what is wrong lies in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").write_text("")
    problem = {"problem": "1 + 1?", "answer": "2", "subject": "Algebra", "level": 1}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem))
    for name in ("dir", "dir.py", "dir.svg"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("precious")
    return {TRAINED: str(trained), EXPORTED: str(exported)}


@pytest.fixture(scope="module")
def exported(script, trained, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    assert script("export_hf", f"--workdir={trained}", f"--out={out}").code == 0
    return out


def complaints(script, name, flag, places) -> Iterator[tuple[str, str]]:
    """Each value, and what the program said of it."""
    fixed, values = TABLE[name, flag]
    for word, place in places.items():
        fixed = [argument.replace(word, place) for argument in fixed]
    for value in values:
        outcome = script(name, *fixed, f"--{flag}={value}")
        assert outcome.code in (1, 2), (value[:80], outcome)
        yield value, outcome.err


@pytest.mark.parametrize(("name", "flag"), TABLE, ids=map("-".join, TABLE))
def test_what_a_flag_cannot_use_is_refused_in_one_line(script, places, name, flag):
    before = sorted(pathlib.Path().rglob("*"))
    for value, said in complaints(script, name, flag, places):
        lines = said.removesuffix("\n").split("\n")
        if lines[0].startswith("FATAL Flags parsing error"):  # absl's, as for all flags
            assert f"--{flag}" in lines[0] + lines[1], value
        else:
            assert len(lines) == 1 and lines[0].startswith("error: "), (value, said)
    assert sorted(pathlib.Path().rglob("*")) == before
