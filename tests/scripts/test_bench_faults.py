"""The faults suite notices what it looks for, whatever runs it looks at."""

import dataclasses
import json
import random
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import (
    faults,
    faults_damage,
    faults_kills,
    faults_runs,
    faults_serving,
)
from jmoe.checkpoint.store import Store
from jmoe.config import override
from jmoe.monitor.run_files import BALANCE, METRICS
from tests.faults import damage, starts

# Steps are rows, checkpoints are directories, and nothing is computed.
PROGRAM = f"""
import json, pathlib, sys, time

SKIPS = 0


def start():
    workdir = pathlib.Path(sys.argv[-1].partition("=")[2])
    saved = workdir / "checkpoints"
    saved.mkdir(parents=True, exist_ok=True)
    at = max((int(path.name) for path in saved.iterdir()), default=0)
    if at:
        print(f"Goes on from the checkpoint of step {{at - SKIPS}}.", flush=True)
    with (workdir / "metrics.jsonl").open("a") as file:
        for step in range(at + 1, {faults_runs.STEPS} + 1):
            file.write(json.dumps({{"step": step, "time": time.time()}}) + "\\n")
            file.flush()
            time.sleep(0.01)
            if step % {faults_runs.SAVE_EVERY} == 0:
                (saved / str(step)).mkdir()
    sys.exit(0)
"""
ROWS = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]


@pytest.fixture
def workdir(tmp_path):
    """What a run leaves, as far as anybody looks."""
    with Store(tmp_path / "run" / "checkpoints", keep=3) as store:
        for step in (1, 2):
            store.save(step, {"x": jnp.arange(9.0) * step}, {"sequences": step})
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in (METRICS, BALANCE, "config.json"):
        (tmp_path / "run" / name).write_text(text)
    return tmp_path / "run"


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints" / "1"), r"\[2\] instead of"),
        (lambda run: (run / "checkpoints" / "0.removed").mkdir(), "0.removed"),
        (lambda run: (run / "config.json").unlink(), "config.json differs"),
        (
            lambda run: edit(run / METRICS, '"step": 2', '"step": 1'),
            rf"{METRICS}: steps \[1, 1, 3\] instead of \[1, 2, 3\]",
        ),
        (lambda run: edit(run / METRICS, "0.5", "0.25"), f"{METRICS}: other numbers"),
        (lambda run: edit(run / BALANCE, "0.5", "0.25"), f"{BALANCE} differs"),
    ],
)
def test_whatever_differs_at_the_end_of_a_run_is_told(workdir, tmp_path, change, said):
    want = faults_runs.read_end(workdir)
    other = shutil.copytree(workdir, tmp_path / "other")
    assert not list(faults_runs.differences(faults_runs.read_end(other), want))
    change(other)
    (found,) = faults_runs.differences(faults_runs.read_end(other), want)
    assert re.search(said, found), found


def test_a_bit_of_an_array_and_a_position_are_told(workdir):
    want = faults_runs.read_end(workdir)
    bits = want.checkpoints[1].arrays["x"]
    for change, said in (
        ({"arrays": {"x": bits[:-1] + "?"}}, "1 arrays differ: x"),
        ({"arrays": {}}, "1 arrays differ: x"),
        ({"position": {"sequences": 2}}, "another position"),
    ):
        other = dataclasses.replace(want.checkpoints[1], **change)
        got = dataclasses.replace(want, checkpoints={**want.checkpoints, 1: other})
        assert list(faults_runs.differences(got, want)) == [f"checkpoint 1: {said}"]
    assert faults_runs.digest(np.float32(0.0)) != faults_runs.digest(np.float32(-0.0))


@pytest.fixture
def program(tmp_path):
    (tmp_path / "fake_training.py").write_text(PROGRAM)
    environment = {"PYTHONPATH": f"{starts.ROOT}:{tmp_path}"}
    with starts.Program("fake_training", environment=environment) as program:
        yield program


KNOWN = faults_kills.Known(0.05, 0.01, [])


def never_at_a_line(monkeypatch):
    monkeypatch.setattr(faults_kills, "SHARES", {"starting": 0.2, "training": 0.8})
    monkeypatch.setattr(faults_kills, "_AFTER_A_STEP_S", 0.01)


def test_a_run_is_killed_so_often_and_then_finishes(program, tmp_path, monkeypatch):
    never_at_a_line(monkeypatch)
    run = faults_kills.Run(program, [], tmp_path / "run")
    run.suffer(3, random.Random(0), KNOWN)
    assert (run.code, run.older, run.saved()) == (0, 0, faults_runs.STEPS)
    assert len(run.kills) == 3
    for kill in run.kills:
        assert 0 <= kill["logged"] - kill["saved"] <= faults_runs.SAVE_EVERY


def test_a_start_from_an_older_checkpoint_is_noticed(program, tmp_path, monkeypatch):
    never_at_a_line(monkeypatch)
    edit(tmp_path / "fake_training.py", "SKIPS = 0", "SKIPS = 3")
    environment = {"PYTHONPATH": f"{starts.ROOT}:{tmp_path}"}
    with starts.Program("fake_training", environment=environment) as program:
        run = faults_kills.Run(program, [], tmp_path / "run")
        run.suffer(2, random.Random(0), KNOWN)
    trial = faults_kills.Trial(older=run.older, kills=run.kills)
    (figure,) = (f for f in faults_kills.figures(trial, 2) if "another" in f.name)
    assert run.older and figure.met is False


def test_moments_are_within_what_is_left_of_a_run():
    chance = random.Random(0)
    lines = [("a.py", 7, 20), ("b.py", 9, 1)]
    known = faults_kills.Known(2.0, 1.0, lines)
    for saved in (0, 15, faults_runs.STEPS - 1):
        for _ in range(20):
            moment = faults_kills.draw_moment("training", chance, saved, known)
            assert saved < moment.step <= faults_runs.STEPS
            _, file, line, times = faults_kills.draw_line(chance, saved, known)
            left = 20 * (faults_runs.STEPS - saved) / faults_runs.STEPS
            assert (file, line) in {("a.py", 7), ("b.py", 9)} and times <= left + 1


def test_damage_that_is_accepted_or_refused_misses_what_is_asked():
    kind = next(iter(damage.KINDS))
    for bad in faults_damage.BAD:
        result = {"counts": {kind: {faults_damage.OLDER: 2, bad: 1}}}
        missed = [f.name for f in faults_damage.figures(result, 3) if f.met is False]
        assert missed == [f"damaged, {bad}"]


def test_parts_can_be_left_out_and_serving_is_skipped_by_name(monkeypatch):
    monkeypatch.setattr(faults_serving, "missing", lambda: ["ray"])
    counts = [f"{part}=0" for part in faults.PARTS if part != "requests"]
    said = []
    report = faults.run(1, said.append, override(faults.Settings(), counts))
    assert (report.figures, report.wrong) == ([], ())
    assert report.samples["requests"] == "Skipped: ray is not installed here." in said
    with pytest.raises(ValueError, match="kills=-1"):
        override(faults.Settings(), ["kills=-1"])
