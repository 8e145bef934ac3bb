"""A run from start to end: stopped, damaged, repeated, it comes to the same."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import urllib.request

import jax
import numpy as np
import pytest

from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.store import Store
from jmoe.config import override
from jmoe.monitor import run_files
from jmoe.monitor.console import Console
from jmoe.monitor.metrics_log import MetricsLog
from jmoe.train import layout as layouts
from jmoe.train import loop
from jmoe.train.loop import train
from jmoe.train.state import TrainState
from jmoe.train.step import Evaluation
from jmoe.train.stretch import evaluate
from jmoe.train.trained import CHECKPOINTS, load_trained
from tests.faults import damage, power
from tests.plain_run import plain_run
from tests.train.whole_runs import assert_same_end, last_state, rows

STOP = 5  # inside the ramp, and between checkpoints

pytestmark = pytest.mark.usefixtures("sharing_programs")


def sample(run, layout, variables, tokenizer):
    return [("prompt", tokenizer.decode([7]))]


@pytest.fixture(scope="module")
def whole_run(smallest, tmp_path_factory) -> pathlib.Path:
    """The directory of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(smallest, workdir, sample=sample) == 0
    return workdir


@pytest.fixture
def copied_run(whole_run, tmp_path) -> pathlib.Path:
    return shutil.copytree(whole_run, tmp_path / "copy")


def files(workdir: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_a_run_leaves_all_its_files_and_metrics(smallest, whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert names == {
        "balance.npy",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "samples.jsonl",
        "tensorboard",
        "tokenizer.json",
    }
    assert {path.name for path in (whole_run / "checkpoints").iterdir()} == {"20", "40"}
    logged = run_files.read_run(whole_run)
    assert [row["step"] for row in logged.rows] == list(range(1, 41))
    assert set(logged.rows[-1]) >= {
        *("loss", "mtp_loss", "grad_norm", "learning_rate", "bias_rate", "tokens"),
        *("max_vio", "max_vio_L", "load_entropy_L", "dead_experts_L", "drop_rate_L"),
        *("max_vio_p50", "max_vio_p95", "max_vio_max", "global_max_vio_p95"),
        *("tokens_per_second", "step_seconds"),
        *("val_loss", "val_perplexity", "global_max_vio", "global_max_vio_L"),
    }
    # Six batches of one microbatch, then 34 of two, of 4 sequences of 32.
    assert logged.last("tokens") == (6 + 34 * 2) * 4 * 32
    assert logged.info["parameters"] > logged.info["active_parameters"] > 0
    assert "prompt" in (whole_run / "report.html").read_text()


def test_a_run_learns_its_text_and_moves_its_biases(smallest, whole_run):
    logged = run_files.read_run(whole_run)
    loss = logged.series("loss").value_NK
    assert abs(loss[0] - np.log(300)) < 0.1  # that of a uniform guess
    assert logged.last("val_loss") < logged.info["unigram_entropy"]
    bias_NLE = logged.balance.bias_NLE
    steps_N = np.abs(np.diff(bias_NLE, axis=0)).max((1, 2))
    np.testing.assert_allclose(steps_N[:38], 1e-3, rtol=1e-3)
    assert steps_N[38:].tolist() == [0]  # the rate turns 0 at 0.966 of the run


def test_samples_are_of_divided_weights_and_their_failure_leaves_the_report(
    smallest, tmp_path
):
    def fail(run, layout, variables, tokenizer):
        where = layouts.shardings(layout, variables)
        same = jax.tree.map(
            lambda x, to: x.sharding.is_equivalent_to(to, x.ndim), variables, where
        )
        assert all(jax.tree.leaves(same)), same
        raise RuntimeError("no samples")

    mesh = ["mesh=data=2,expert=4,tensor=2", "train.microbatch_size=8"]
    steps = ["train.ramp_start=none", "train.steps=2", "schedule.steps=40"]
    run = override(smallest, [*mesh, *steps])
    with pytest.raises(RuntimeError, match="no samples"):
        train(run, tmp_path / "run", sample=fail)
    assert (tmp_path / "run" / "report.html").exists()
    assert load_trained(tmp_path / "run").step == 2


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    smallest, whole_run, tmp_path, monkeypatch, capsys
):
    class Stopping(MetricsLog):
        def log(self, step, *arguments, **options):
            super().log(step, *arguments, **options)
            if step == STOP:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "MetricsLog", Stopping)
        assert train(smallest, tmp_path / "run", sample=sample) == signal.SIGTERM
    assert f"SIGTERM: saved step {STOP}" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, STOP + 1))
    assert load_trained(tmp_path / "run").step == STOP
    assert not (tmp_path / "run" / "report.html").exists()
    handler = signal.getsignal(signal.SIGTERM)

    assert train(smallest, tmp_path / "run", sample=sample) == 0
    out = capsys.readouterr().out
    assert f"Goes on from the checkpoint of step {STOP}" in out
    assert "Since the last start: nothing has changed." in out
    assert_same_end(smallest, tmp_path / "run", whole_run)
    assert signal.getsignal(signal.SIGTERM) == handler == signal.SIG_DFL


@pytest.mark.parametrize(("factor", "is_said"), [("1.25", True), ("1.1", False)])
def test_a_capacity_factor_that_can_drop_nothing_is_said_so(
    factor, is_said, tmp_path, capsys
):
    """With 4 groups on 2 devices, each gets 81% of the tokens that choose 2 groups."""
    settings = ["mesh=expert=2", f"model.moe.exchange.capacity_factor={factor}"]
    run = override(plain_run(), settings)
    with Console(10) as console:
        loop._show_header(console, run, tmp_path, (1, 1), step=0)
    said = f"capacity_factor={factor} drops nothing: with expert=2 it leaves room for"
    assert (said in capsys.readouterr().out) == is_said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("mesh=expert=2", "borrows up to 4 experts a layer and microbatch"),
        ("model.moe.exchange.slots=1", "has nothing to lend: with expert=1"),
        ("train.reassign_every=9", "every=9 has nothing to re-assign: with expert=1"),
    ],
)
def test_what_devices_can_lend_is_said(setting, said, tmp_path, capsys):
    run = override(plain_run(), ["model.moe.exchange.backend=balanced", setting])
    with Console(10) as console:
        loop._show_header(console, run, tmp_path, (1, 1), step=0)
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    assert ("lending" in shown) == ("mesh" in setting)


def test_a_run_falls_back_from_a_damaged_checkpoint_and_ends_the_same(
    smallest, whole_run, copied_run, capsys
):
    arrays = max((copied_run / "checkpoints" / "40").rglob("*"), key=_size)
    arrays.write_bytes(arrays.read_bytes()[:-1])
    run = override(smallest, ["train.keep_checkpoints=3"])
    assert train(run, copied_run, sample=sample) == 0
    out = capsys.readouterr().out
    assert "Goes on from the checkpoint of step 20" in out
    assert "Since the last start: train.keep_checkpoints 2 -> 3." in out
    assert_same_end(smallest, copied_run, whole_run)
    assert (copied_run / "checkpoints" / "40.aside").exists()  # nothing is lost


def test_a_copy_under_another_steps_name_is_refused_whatever_its_manifest_says(
    smallest, copied_run
):
    found = damage.Checkpoints(*(copied_run / "checkpoints" / n for n in ("40", "20")))
    damage.FORGED["forge the older as newer"](found, random.Random(0))
    with pytest.raises(ValueError, match="named by step 40, but .* is of step 20"):
        train(smallest, copied_run)


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def test_a_complete_run_says_so_and_changes_nothing(smallest, copied_run, capsys):
    before = files(copied_run)
    assert train(smallest, copied_run, sample=sample) == 0
    assert "Complete at step 40; raise train.steps" in capsys.readouterr().out
    after = files(copied_run)
    changed = {path.name for path, data in after.items() if before.get(path) != data}
    events = {path.name for path in (copied_run / "tensorboard").iterdir()}
    assert changed - events <= {"run.json", "report.html"}
    assert before.keys() <= after.keys()


def test_a_second_run_in_the_workdir_is_refused_while_the_first_is_there(
    smallest, copied_run
):
    seen = []

    def begin_another(*_):
        before = files(copied_run)
        with pytest.raises(
            ValueError, match=rf"copy' is being .*process {os.getpid()}"
        ):
            train(smallest, copied_run)
        seen.append(files(copied_run) == before)
        return []

    assert train(smallest, copied_run, sample=begin_another) == 0
    assert seen == [True]
    assert not (copied_run / ".lock").exists()


def test_a_run_is_shown_live_and_ends_as_one_that_is_not(smallest, whole_run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen = []

    def look(*_):
        for path in ("metrics", "events"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as page:
                seen.append(page.read(2000).decode())
        return []

    shown = override(smallest, [f"monitor.port={port}"])
    assert train(shown, tmp_path / "run", sample=look) == 0
    assert "jmoe_train_step 40.0" in seen[0]
    assert "step 40 of 40 \\u00b7 complete" in seen[1]
    assert_same_end(smallest, tmp_path / "run", whole_run)


def test_a_port_in_use_begins_no_run(smallest, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"monitor.port={port} can't be had"):
            train(override(smallest, [f"monitor.port={port}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_model_is_refused_and_nothing_overwritten(smallest, copied_run):
    other = override(smallest, ["model.hidden_dim=48", "train.seed=1"])
    before = files(copied_run)
    with pytest.raises(ValueError, match="model.hidden_dim: 32 there, 48 given") as e:
        train(other, copied_run)
    assert "train.seed: 0 there, 1 given" in str(e.value)
    assert files(copied_run) == before


def test_where_no_checkpoint_is_whole_nothing_begins_at_random(smallest, copied_run):
    for step in (20, 40):
        (copied_run / "checkpoints" / str(step) / "manifest.json").write_text("{}")
    before = files(copied_run)
    with pytest.raises(FileNotFoundError, match="No whole checkpoint in .*: 40, 20"):
        train(smallest, copied_run)
    assert files(copied_run) == before


def test_an_imported_runs_record_begins_nothing_at_random(smallest, tmp_path):
    run = override(smallest, ["initial_weights=imported"])
    workdirs.open_run(tmp_path / "without_checkpoint", run)
    before = files(tmp_path)
    for name in ("without_checkpoint", "new"):
        complaint = f"workdir='.*{name}' has no checkpoint .* let workdir be"
        with pytest.raises(ValueError, match=complaint):
            train(run, tmp_path / name)
    assert files(tmp_path) == before and not (tmp_path / "new").exists()


def test_a_power_cut_at_any_moment_loses_nothing_since_the_last_checkpoint(
    smallest, tmp_path
):
    every_step = ["train.checkpoint_every=1", "train.keep_checkpoints=1"]
    run = override(smallest, ["train.steps=2", "schedule.steps=40", *every_step])
    (tmp_path / "root").mkdir()
    with power.Disk(tmp_path / "root") as disk:
        assert train(run, tmp_path / "root" / "run") == 0
        disk.promise(2)
    steps = set()
    for count, image in enumerate(disk.images):
        image.restore(tmp_path / str(count))
        workdir = tmp_path / str(count) / "run"
        with Store(workdir / CHECKPOINTS) as store:
            step = store.latest_step()
        if step not in steps or image.promised:
            assert (step or 0) >= (image.promised or 0)
            assert step is None or load_trained(workdir).step == step
        steps.add(step)
        logged = {row["step"] for row in rows(workdir)}
        assert logged >= set(range(1, (step or 0) + 1))
        assert step is None or json.loads((workdir / "run.json").read_text())
    assert steps == {None, 1, 2}


def test_a_run_goes_on_with_its_own_tokenizer(smallest, copied_run, capsys):
    shutil.rmtree(smallest.data.cache_dir + "/tokenizers")
    assert train(smallest, copied_run) == 0
    assert not pathlib.Path(smallest.data.cache_dir, "tokenizers").exists()


def test_loading_a_model_reads_what_training_saved(smallest, whole_run):
    for step in (20, None):
        trained = load_trained(whole_run, step=step)
        assert trained.step == (step or 40)
        assert trained.run == smallest
        assert trained.tokenizer.decode(trained.tokenizer.encode("The 1")) == "The 1"
    state, _, _ = last_state(smallest, whole_run)
    saved = {"params": state.params, "router_state": state.router_state}
    same = jax.tree.map(np.array_equal, trained.variables, saved)
    assert all(jax.tree.leaves(same))


def test_an_evaluation_weighs_batches_by_tokens_and_adds_their_counts():
    parts = [
        Evaluation(np.float32(30), np.float32(10), np.array([[6, 0], [3, 3]])),
        Evaluation(np.float32(10), np.float32(10), np.array([[0, 6], [6, 0]])),
    ]
    state = TrainState(step=0, params=None, router_state=None, opt_state=None)
    got = evaluate(lambda params, router_state, i: parts[int(i)], state, [0, 1])
    assert got["val_loss"] == 2.0
    assert got["val_perplexity"] == pytest.approx(np.exp(2.0))
    # Global: the first layer's two imbalances cancel, the second's don't.
    np.testing.assert_allclose(got["global_max_vio_L"], [0.0, 0.5])
    assert got["global_max_vio"] == got["global_max_vio_p50"] == pytest.approx(0.25)
    assert got["global_max_vio_max"] == pytest.approx(0.5)


def test_the_record_of_a_run_says_how_it_was_made(whole_run):
    (info,) = json.loads((whole_run / "run.json").read_text())
    assert info["device"].startswith("CPU")
    assert {"python", "jax", "jmoe"} <= info["versions"].keys()
