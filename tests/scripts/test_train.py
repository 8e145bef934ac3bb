"""scripts/train.py, as its user sees it."""

import json
import keyword
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.checkpoint.store import Store
from jmoe.checkpoint.workdir import read_run
from jmoe.commands import train
from jmoe.config import override
from jmoe.data.tokenizer import train_bpe
from jmoe.monitor import run_files
from jmoe.train.trained import load_trained
from tests.several_processes import xla_flags
from tests.smallest_run import get_config
from tests.train.whole_runs import last_state

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train.py"

pytestmark = pytest.mark.usefixtures("sharing_programs")


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def start(*arguments: str) -> subprocess.Popen:
    """A process of its own and of one device; what it compiles is kept for the next."""
    cache = {
        name.upper(): str(jax.config.values[name])
        for name in (
            "jax_compilation_cache_dir",
            "jax_persistent_cache_min_compile_time_secs",
        )
    }
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        env=os.environ | cache | {"XLA_FLAGS": xla_flags(devices=1)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_new_run_shows_its_progress_and_result_and_nothing_else(trained):
    shown = (trained / "terminal").read_text()
    assert re.match(r"(Tokenised .*\n)?\s*jmoe smallest\n", shown)
    for expected in ("parameters", "40/40", "validation loss", "global MaxVio"):
        assert expected in shown
    for noise in ("Warning", "WARNING", "INFO", "orbax", ".py:"):
        assert noise not in shown
    samples = (trained / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 3


def test_sigterm_saves_before_the_exit_and_the_same_command_goes_on(
    script, trained, smallest_arguments, tmp_path
):
    arguments = [f"--workdir={tmp_path / 'run'}", *smallest_arguments]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = start(*arguments)
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"SIGTERM: saved step {step}; the same command goes on" in out
    assert 0 < step < 40

    outcome = script("train", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"Goes on from the checkpoint of step {step}." in outcome.out
    assert losses(tmp_path / "run") == losses(trained)


def test_a_run_that_diverges_ends_with_an_error_and_finite_weights(
    script, smallest_arguments, tmp_path
):
    workdir = f"--workdir={tmp_path / 'run'}"
    settings = ["optimizer.schedule.peak=1e30", "train.max_skipped=3"]
    settings.append("train.on_nonfinite=skip")
    outcome = script(
        "train", workdir, *smallest_arguments, *(f"--set={s}" for s in settings)
    )
    assert outcome.code == 3
    assert_one_line(outcome.err, "skipped: loss or gr.*3 in a row, train.max_skipped")
    assert "Step 3 skipped: loss or gradients aren't finite" in outcome.out
    rows = list(run_files.read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert [row["skipped"] for row in rows][:3] == [0, 0, 1]
    step = rows[-1]["step"]
    assert load_trained(tmp_path / "run").step == step  # which wants finite weights


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        ("stop", "train.on_nonfinite='stop'"),
        ("roll_back", "gone back to step 2 as often as it may, train.max_roll_backs=3"),
    ],
)
def test_a_run_that_may_not_skip_ends_before_what_it_spoilt_is_a_checkpoint(
    script, smallest_arguments, tmp_path, policy, complaint
):
    workdir = f"--workdir={tmp_path / 'run'}"
    settings = ["optimizer.schedule.peak=1e30", "train.checkpoint_every=1"]
    settings.append(f"train.on_nonfinite={policy}")
    outcome = script(
        "train", workdir, *smallest_arguments, *(f"--set={s}" for s in settings)
    )
    assert outcome.code == 3
    assert_one_line(outcome.err, f"Step 3: loss or gradients aren't .*{complaint}")
    assert outcome.out.count("Back to step 2") == (3 if policy == "roll_back" else 0)
    assert load_trained(tmp_path / "run").step == 2  # which wants finite weights


@pytest.fixture(scope="module")
def broken(trained, tmp_path_factory) -> pathlib.Path:
    """The run with weights that aren't finite in its newest checkpoint."""
    workdir = shutil.copytree(trained, tmp_path_factory.mktemp("runs") / "broken")
    state, position, step = last_state(read_run(workdir), workdir)
    params = {**state.params, "head": state.params["head"] * np.nan}
    state = state.replace(step=state.step + 1, params=params)
    with Store(workdir / "checkpoints") as store:
        store.save(step + 1, jax.tree.map(jnp.asarray, state), position)
    return workdir


@pytest.mark.parametrize("name", ["train", "generate", "evaluate", "export_hf"])
def test_a_checkpoint_that_is_not_finite_is_one_line(
    script, smallest_arguments, broken, name
):
    before = files(broken.parent)
    arguments = [*smallest_arguments, "--set=train.steps=60"] if name == "train" else []
    held = ["--set=schedule.beyond=hold"] if name == "train" else []
    outcome = script(name, f"--workdir={broken}", *arguments, *held)
    assert outcome.code == 2
    assert_one_line(
        outcome.err, "checkpoints/41.* NaN or infinite numbers in params/head"
    )
    assert files(broken.parent) == before


def test_a_complete_run_says_so(script, trained, smallest_arguments, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    samples = (workdir / "samples.jsonl").read_bytes()
    outcome = script("train", f"--workdir={workdir}", *smallest_arguments)
    assert outcome.code == 0 and outcome.err == ""
    assert "Complete at step 40; raise train.steps to go on." in outcome.out
    assert (workdir / "samples.jsonl").read_bytes() == samples


@pytest.fixture
def inputs(tmp_path) -> pathlib.Path:
    """A directory of files that can't be used."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("naïve ".encode("latin1") * 2000)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "tokenizer.json").write_text("{}")
    train_bpe([" ".join(keyword.kwlist)], 301).save(str(tmp_path / "large.json"))
    (tmp_path / "no_config.py").write_text("import jmoe\n")
    (tmp_path / "raises.py").write_text("def get_config():\n    return {}['x']\n")
    (tmp_path / "syntax.py").write_text("def get_config(:\n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("precious")
    return tmp_path


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--experiment=huge", "Unknown experiment 'huge'; known: tiny, small"),
        ("--experiment={}/none.py", "experiment='.*none.py' is not a file"),
        ("--experiment={}/no_config.py", "no_config.py' has no get_config"),
        ("--experiment={}/raises.py", "raises.py', line 2: KeyError: 'x'"),
        ("--experiment={}/syntax.py", "SyntaxError: invalid syntax .*line 1"),
        ("--experiment={}/list.json", "list.json is not the record of a run"),
        ("--experiment={}/deep.json", "deep.json is not the record of a run"),
        ("--experiment=gs://bucket/run.json", "experiment=.* must be a path of this"),
        ("--workdir=gs://bucket/run", "workdir=.* must be a path of this machine"),
        ("--set=data.sources.0.path=gs://text.txt", "path=.* must be a path of this"),
        ("--set=data.tokenizer=gs://t.json", "tokenizer=.* must be a path of this"),
        ("--set=data.cache_dir=gs://cache", "cache_dir=.* must be a path of this"),
        ("--workdir=~nobody_here/run", "workdir='~nobody_here/run'.* home"),
        ("--set=train.stepz=9", "Unknown field 'train.stepz'.*mean 'steps'"),
        ("--set=train.steps", "'train.steps' must read path.to.field=value"),
        ("--set=train.steps=many", "train.steps='many' must be of type int"),
        ("--set=model.moe.router.top_k=5", "top_k=5 exceeds the 4 experts reachable"),
        ("--set=model.moe.router.num_groups=3", "num_experts=8.*num_groups=3 equal"),
        ("--set=train.microbatch_size=3", "batch_size=8.*multiple of microbatch_size"),
        ("--set=data.sequence_length=65", "sequence_length=65.*max_positions=64"),
        ("--set=data.sources.0.path={}/none.txt", "No file matches.*none.txt"),
        ("--set=data.sources.0.path={}/empty.txt", "empty.txt: the file is empty"),
        ("--set=data.sources.0.path={}/latin1.txt", "latin1.txt: not UTF-8 at byte"),
        ("--set=data.sources.0.path={}/image.png", "image.png: not a file of a known"),
        ("--set=data.tokenizer={}/none.json", "tokenizer='.*none.json': no such"),
        ("--set=data.tokenizer={}/tokenizer.json", "is not a tokenizer.json"),
        ("--set=data.tokenizer={}/large.json", "301 tokens, more than.*vocab_size=300"),
        ("--set=model.vocab_size=200", "vocab_size=200 must be at least 257"),
        ("--workdir={}/foreign", "foreign' has no config.json but holds 'thesis.tex'"),
        ("--workdir={}/empty.txt", "empty.txt' must be a directory"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_leaves_nothing(
    script, smallest_arguments, inputs, argument, complaint
):
    before = files(inputs)
    outcome = script(
        "train",
        f"--workdir={inputs / 'new'}",
        *smallest_arguments,
        argument.format(inputs),
    )
    assert outcome.code == 2
    assert_one_line(outcome.err, complaint)
    assert outcome.out == ""
    assert files(inputs) == before


def assert_one_line(err: str, complaint: str) -> None:
    assert err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises(ValueError, match=complaint):
        raise ValueError(err)


def files(directory: pathlib.Path) -> dict[pathlib.Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def test_the_workdir_of_another_model_is_refused_field_by_field(
    script, smallest_arguments, trained
):
    before = files(trained)
    change = ["--set=model.hidden_dim=48", "--set=data.seed=1"]
    outcome = script("train", f"--workdir={trained}", *smallest_arguments, *change)
    assert outcome.code == 2
    assert "model.hidden_dim: 32 there, 48 given" in outcome.err
    assert "data.seed: 0 there, 1 given" in outcome.err
    assert files(trained) == before


def test_where_a_mistake_was_noticed_is_shown_on_request():
    process = start("--set=train.steps=0", "--verbosity=0")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "error: steps=0 must be at least 1.\n" in err
    assert "in read_experiment" in err


def test_an_unknown_flag_is_refused_with_a_suggestion():
    process = start("--workdirr=x")
    _, err = process.communicate()
    assert process.returncode == 1  # absl's
    assert "Unknown command line flag 'workdirr'. Did you mean: workdir" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["expert_choice", "replayed"])
def test_a_run_that_generates_no_text_ends_without_samples(kind):
    router = {"kind": kind, "num_experts": 8, "top_k": 2}
    run = override(get_config(), [f"model.moe.router={router}"])
    assert train.sample(run, None, None, None) == []
