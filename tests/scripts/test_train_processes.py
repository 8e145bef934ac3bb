"""scripts/train.py as two processes on one machine, of two devices each."""

import json
import os
import pathlib
import re
import shutil
import signal
import time

import numpy as np
import pytest

from jmoe.monitor import run_files
from jmoe.parallel import processes
from tests import several_processes
from tests.several_processes import Copy, Ended

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train.py"
STEPS = 8
MOVED = "experts_moved_L"
MESH = ["--set=mesh.data=2", "--set=mesh.expert=2"]

pytestmark = pytest.mark.usefixtures("sharing_programs")


@pytest.fixture(scope="module")
def arguments(smallest_arguments) -> list[str]:
    """A run that is quick to compile, and saves every step."""
    values = {
        "model.num_layers": 1,
        "model.num_dense_layers": 0,
        "model.mtp_depth": 0,
        "train.steps": STEPS,
        "train.batch_size": 4,
        "train.ramp_start": "none",
        "train.eval_every": STEPS,
        "train.checkpoint_every": 1,
        "train.signal_every": 2,
        "train.on_spike": "skip",
    }
    return [*smallest_arguments, *(f"--set={k}={v}" for k, v in values.items())]


@pytest.fixture(scope="module")
def start_two():
    """Starts both processes; each with arguments and a directory of its own."""
    imports = "jmoe.train.loop", "jmoe.decode.generate", "jmoe.decode.on_mesh"
    with several_processes.program_of_two("jmoe.commands.train", *imports) as start:

        def start_two(arguments, *, own=((), ()), cwd=(ROOT, ROOT)) -> list[Copy]:
            both = zip(places(), own, strict=True)
            return start([[*arguments, *place, *mine] for place, mine in both], cwd)

        yield start_two


def places() -> list[list[str]]:
    """What tells each of two processes who it is."""
    address = several_processes.free_address()
    return [
        [f"--coordinator={address}", "--num_processes=2", f"--process_id={index}"]
        for index in (0, 1)
    ]


def ended(running: list[Copy]) -> list[Ended]:
    return [process.ended() for process in running]


def measured(workdir: pathlib.Path) -> list[tuple[int, float, int]]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["tokens"]) for row in rows if "loss" in row]


def assert_same_run(got: pathlib.Path, want: pathlib.Path) -> None:
    """The same losses, and to the bit the same experts' loads and biases."""
    np.testing.assert_allclose(measured(got), measured(want), rtol=1e-5)
    assert (got / "balance.npy").read_bytes() == (want / "balance.npy").read_bytes()
    entropies = [
        json.loads((workdir / "run.json").read_text())[-1]["unigram_entropy"]
        for workdir in (got, want)
    ]
    assert entropies[0] == entropies[1]


@pytest.fixture(scope="module")
def alone(script, arguments, tmp_path_factory) -> pathlib.Path:
    """The run as one process with one device."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    outcome = script("train", f"--workdir={workdir}", *arguments)
    assert outcome.code == 0, outcome.err
    return workdir


@pytest.fixture(scope="module")
def stopped(start_two, arguments, tmp_path_factory) -> tuple[pathlib.Path, list]:
    """The run as two processes, one of which was asked to stop; and how they ended."""
    workdir = tmp_path_factory.mktemp("runs") / "stopped"
    running = start_two([f"--workdir={workdir}", *arguments, *MESH])
    metrics = workdir / "metrics.jsonl"
    zero, one = (process.start for process in running)
    while zero.code() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    os.kill(one.pid, signal.SIGTERM)
    return workdir, ended(running)


def test_a_signal_to_one_process_stops_all_at_the_same_step(stopped):
    workdir, ended = stopped
    assert [process.code for process in ended] == [128 + signal.SIGTERM] * 2
    assert [process.err for process in ended] == ["", ""]
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 0 < step < STEPS and step % 2 == 0
    assert f"SIGTERM: saved step {step}; the same command goes on" in ended[0].out


def test_only_process_0_shows_anything(stopped):
    _, ended = stopped
    assert "jmoe smallest" in ended[0].out and ended[1].out == ""


def test_one_process_goes_on_where_two_stopped(script, arguments, stopped, alone):
    workdir, _ = stopped
    outcome = script("train", f"--workdir={workdir}", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Goes on from the checkpoint of step" in outcome.out
    assert_same_run(workdir, alone)


def test_two_processes_go_on_where_one_stopped(start_two, arguments, alone, tmp_path):
    workdir = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    done = ended(start_two([f"--workdir={workdir}", *arguments, *MESH]))
    assert [(process.code, process.err) for process in done] == [(0, "")] * 2
    assert f"Goes on from the checkpoint of step {STEPS - 1}" in done[0].out
    assert len((workdir / "samples.jsonl").read_text().splitlines()) == 3
    assert_same_run(workdir, alone)


@pytest.mark.long
def test_experts_that_change_processes_leave_the_run_as_it_is(
    start_two, arguments, tmp_path
):
    moving = ["--set=train.reassign_every=2", "--set=train.reassign_above=0.0"]
    for name, settings in {"moving": moving, "in_order": []}.items():
        settings = [
            *("--set=mesh.expert=4", f"--workdir={tmp_path / name}", *settings),
            *("--set=model.moe.router.num_groups=1", "--set=train.checkpoint_every=4"),
            "--set=model.moe.router.groups_per_token=1",
        ]
        done = ended(start_two([*arguments, *settings]))
        assert [(process.code, process.err) for process in done] == [(0, "")] * 2
    assert_same_run(tmp_path / "moving", tmp_path / "in_order")
    rows = run_files.read_rows(tmp_path / "moving" / "metrics.jsonl")
    moved = {row["step"]: row[MOVED] for row in rows if MOVED in row}
    assert list(moved) == [2, 4, 6] and np.sum(list(moved.values())) > 0


def test_two_processes_go_back_together_and_end_with_the_same_error(
    start_two, arguments, tmp_path
):
    diverging = {
        "optimizer.schedule.peak": 1e30,
        "train.on_nonfinite": "roll_back",
        "train.max_roll_backs": 1,
        "train.checkpoint_every": STEPS,
        "train.checkpoint_minutes": 0,  # at steps where both ask, which are even
    }
    more = [f"--set={k}={v}" for k, v in diverging.items()]
    workdir = f"--workdir={tmp_path / 'run'}"
    zero, one = ended(start_two([workdir, *arguments, *MESH, *more]))
    assert (zero.code, one.code) == (3, 3)
    assert zero.err == one.err and zero.err.startswith("error: Step 3: ")
    assert "gone back to step 2 as often as it may" in zero.err
    (row,) = run_files.read_rows(tmp_path / "run" / "roll_backs.jsonl")
    assert (row["step"], row["sequences"]) == (2, [8, 12])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


def complaints(both: list[Ended]) -> list[str]:
    """What both processes end with: one message each, and the exit code for it."""
    assert [process.code for process in both] == [2, 2]
    for process in both:
        assert re.fullmatch("(Tokenised .*\n)?", process.out)
        assert process.err.startswith("error: ") and process.err.count("error") == 1
    return [process.err.removeprefix("error: ") for process in both]


def test_different_records_are_refused_by_field_on_both(start_two, arguments, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    differing = (["--set=train.seed=3"], ["--set=train.log_every=7"])
    said = complaints(ended(start_two([*arguments, *MESH, workdir], own=differing)))
    assert (
        said
        == [
            "The processes must agree, but differ in\n"
            "  train.log_every: 1 on process 0, 7 on process 1\n"
            "  train.seed: 3 on process 0, 0 on process 1\n"
        ]
        * 2
    )
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_one_process_ends_both(start_two, arguments, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    own = ([], ["--set=train.stepz=1"])
    said = complaints(ended(start_two([*arguments, *MESH, workdir], own=own)))
    assert said[0] == f"process 1: {said[1]}" and "'train.stepz'" in said[1]


def test_data_that_one_process_lacks_ends_both(start_two, arguments, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "text.txt").write_text("Some text. " * 4000)
    source = "--set=data.sources=[{'path': 'text.txt'}]"
    given = [*arguments, *MESH, source, f"--workdir={tmp_path / 'run'}"]
    running = start_two(given, cwd=(tmp_path / "here", tmp_path / "there"))
    said = complaints(ended(running))
    assert said[1] == "No file matches the source path 'text.txt'.\n"
    assert said[0] == f"process 1: {said[1]}"
    assert not (tmp_path / "run").exists()


def test_different_code_is_refused_by_file_on_both(arguments, tmp_path):
    shutil.copytree(ROOT / "jmoe", tmp_path / "jmoe")
    with (tmp_path / "jmoe" / "train" / "step.py").open("a") as file:
        file.write("# another version\n")
    given = [*arguments, *MESH, f"--workdir={tmp_path / 'run'}"]
    running = [
        several_processes.start([SCRIPT, *given, *place], root=root)
        for place, root in zip(places(), (ROOT, tmp_path), strict=True)
    ]
    said = complaints(several_processes.ended(running, timeout_s=60))
    assert said[0] == said[1] and said[0].count("\n") == 2
    assert "\n  code.jmoe/train/step.py: " in said[0]


def test_a_process_that_never_joins_is_named(script, monkeypatch):
    monkeypatch.setattr(processes, "JOIN_TIMEOUT_S", 0.5)
    monkeypatch.setenv("JMOE_SECRET", several_processes.SECRET.decode())
    address = several_processes.free_address()
    place = [f"--coordinator={address}", "--num_processes=3", "--process_id=0"]
    error = script("train", *place).mistake()
    assert error == "error: Of 3 processes, number 1-2 didn't come within 0.5 s.\n"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--num_processes=2"], "nor known .*: coordinator, process_id"),
        (["--coordinator=a:1", "--process_id=0"], "nor known .*: num_processes"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "process_id=2"),
        (["--coordinator=a", "--num_processes=2", "--process_id=0"], "host:port"),
    ],
)
def test_flags_that_are_incomplete_or_impossible_are_refused(script, flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        raise ValueError(script("train", *flags).mistake())
