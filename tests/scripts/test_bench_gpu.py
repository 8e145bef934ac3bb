"""The GPU benchmark's parts, at sizes for a CPU: what it checks, and what it tells."""

import itertools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from experiments.benchmarks import (
    gpu,
    gpu_figures,
    gpu_jax,
    gpu_measure,
    gpu_shapes,
    gpu_side,
    gpu_steps,
    gpu_timing,
)
from experiments.benchmarks.gpu_shapes import (
    BOTH_PASSES,
    FORWARD,
    WEIGHTS,
    Attention,
    Ceilings,
    Decode,
    Dense,
    Grouped,
)
from experiments.benchmarks.gpu_timing import Clock, Contender, Failed, Measured
from experiments.benchmarks.workers import Worker
from tests.scripts.test_bench import SMALL

ATTENTION = Attention(
    name="attention", batch=2, length=150, heads=2, qk_dim=24, value_dim=16
)
GROUPED = Grouped(
    name="grouped",
    experts=4,
    rows=150,
    inputs=200,
    outputs=72,
    skew=True,
    compared=True,
)
CASES = (
    Ceilings(size=64, copied=1024),
    Dense(name="dense", rows=200, inputs=256, outputs=130),
    GROUPED,
    ATTENTION,
    Decode(name="decode", batch=2, length=40, heads=3, latent_dim=24, value_dim=16),
)
ONLY_ON_GPU = ("cuDNN", "tokamax")
SUBJECTS = [
    pytest.param(subject, id=f"{case.name} {subject.operation} {subject.system}")
    for case in CASES
    for subject in gpu_jax.subjects(case)
    if subject.system not in ONLY_ON_GPU
]


@pytest.fixture
def short(monkeypatch):
    """No more is run than it takes to have a result."""
    monkeypatch.setattr(gpu_measure, "_MOST_SETS", 2)
    monkeypatch.setattr(gpu_timing, "MOST_PASSES", 1)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_system_computes_what_its_reference_does(subject, short):
    measured = gpu_measure.prepare(subject, jax.random.key(time.time_ns()))(2)
    assert len(measured.seconds) == 2 and min(measured.seconds) > 0
    assert (measured.error is None) == (subject.reference is None)
    assert measured.is_right, measured


@pytest.mark.parametrize("wrong", [0.0, 100.0, np.nan])
@pytest.mark.parametrize("where", [(0, 0, 0), (1, 149, 299)])
def test_one_wrong_number_is_an_error_of_its_tile(where, wrong):
    want = jax.random.normal(jax.random.key(0), (2, 150, 300)) + 3
    got = want.at[where].set(wrong)
    assert not float(gpu_measure.worst_tile((want, got), (want, want))) < 0.008
    assert float(gpu_measure.worst_tile(want.astype(jnp.bfloat16), want)) < 0.003


def test_where_all_is_zero_so_must_be_the_result():
    zeros = jnp.zeros((3, 5))
    assert float(gpu_measure.worst_tile(zeros, zeros)) == 0
    assert float(gpu_measure.worst_tile(zeros.at[1, 1].set(1e-6), zeros)) > 1


@pytest.mark.parametrize("change", [lambda y: y * 1.05, lambda y: y * np.nan])
def test_a_result_that_is_wrong_is_said_to_be(change, short):
    subject = next(s for s in gpu_jax.subjects(GROUPED) if s.system == "ours")
    broken = subject._replace(
        function=lambda *inputs: change(subject.function(*inputs))
    )
    measured = gpu_measure.prepare(broken, jax.random.key(0))(1)
    contender = Contender("grouped", FORWARD, "ours", is_checked=True)
    report = gpu.make_report({contender: measured}, {})
    (figure,) = gpu_figures.errors({contender: measured})
    assert figure.met is False and figure.value <= 1
    (said,) = report.wrong
    assert str(contender) in said


def test_a_checked_contender_without_a_result_is_wrong_and_others_are_not():
    outcomes = {
        Contender("grouped", FORWARD, "ours", is_checked=True): Failed("it broke"),
        Contender("grouped", FORWARD, "tokamax"): Failed("no such shape"),
    }
    report = gpu.make_report(outcomes, {})
    assert report.wrong == ("grouped: forward, ours: it broke",)
    assert len(report.samples["failed"]) == 2


def test_what_another_package_refuses_is_its_result():
    contenders = gpu_jax.contenders((ATTENTION,), 0)
    prepare = contenders[Contender("attention", FORWARD, "cuDNN")]
    assert isinstance(gpu_jax.attempt(lambda: prepare()(1)), Failed)


def test_each_contender_is_in_one_share_and_can_be_compiled_ahead(short):
    shares = [gpu_jax.side(CASES[:2], 0, 1, (part, 3)) for part in range(3)]
    listed = [name for tasks in shares for name in tasks["contenders"]()]
    assert listed == list(gpu_jax.contenders(CASES[:2], 0))
    for tasks in shares:
        tasks["prepare"]()
        for name in tasks["contenders"]():
            assert min(tasks[str(name)]().seconds) > 0


def test_torch_times_every_operation_too(short):
    torch = pytest.importorskip("torch", reason="needs the test extra's torch")
    from experiments.benchmarks import gpu_torch

    found = gpu_torch.contenders(CASES, "cpu", 1)
    assert {c.case for c in found} == {case.name for case in CASES[:4]}
    for contender, run in found.items():
        if contender.case != "attention":  # kernels that are for GPUs
            assert min(run().seconds) > 0
    with torch.no_grad():
        q, v = torch.randn(2, 2, 9, 24), torch.randn(2, 2, 9, 16)
        backend = gpu_torch.SDPBackend.MATH
        plain, padded = (
            gpu_torch._attend(0.3, backend, is_padded, q, q, v)
            for is_padded in (False, True)
        )
    np.testing.assert_allclose(plain, padded, rtol=1e-5, atol=1e-6)


def test_torchs_grouped_products_are_ours():
    torch = pytest.importorskip("torch", reason="needs the test extra's torch")
    from experiments.benchmarks import gpu_torch

    theirs = {
        s.operation: s
        for s in gpu_torch.subjects(GROUPED, "cpu")
        if s.system == "torch grouped_mm"
    }
    for subject in gpu_jax.subjects(GROUPED):
        if subject.system != "ours":
            continue
        *operands, size_E = subject.make(jax.random.key(1))
        tensors = [torch.tensor(np.asarray(x, np.float32)).bfloat16() for x in operands]
        got = theirs[subject.operation].function(*tensors).float().numpy()
        want = np.asarray(subject.function(*operands, size_E), np.float32)
        np.testing.assert_allclose(got, want, rtol=0.02, atol=0.05)


def test_transformers_steps_for_a_gpu_train():
    pytest.importorskip("torch", reason="needs the test extra's torch")
    pytest.importorskip("transformers", reason="needs the test extra's transformers")
    from experiments.benchmarks import theirs

    step = theirs.train_step_on_gpu(SMALL, "eager", device="cpu")["step"]
    losses = [step() for _ in range(4)]
    assert losses[0] > losses[-1]


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize(("experts", "rows"), [(3, 100), (64, 24_576)])
def test_every_row_has_an_expert(experts, rows, skew):
    case = Grouped(name="", experts=experts, rows=rows, inputs=1, outputs=1, skew=skew)
    sizes = case.sizes()
    assert sum(sizes) == rows and len(sizes) == experts
    assert (sizes[-1] == 0) == skew
    if not skew:
        assert max(sizes) - min(sizes) <= experts


def test_no_two_contenders_have_one_name():
    names = [case.name for case in gpu_shapes.CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        found = [s[:2] for s in gpu_jax.subjects(case)]
        assert len(set(found)) == len(found)


def measured(*seconds, error=None):
    return Measured(list(seconds), error, None if error is None else 0.01)


def outcomes(case, operation, **seconds):
    return {
        Contender(case, operation, system.replace("_", " ")): measured(s)
        for system, s in seconds.items()
    }


FABRICATED = {
    **outcomes("ceilings", "matmul", XLA=4e-9, torch=2e-9),
    **outcomes("ceilings", "copy", XLA=2e-9),
    **outcomes("dense", FORWARD, XLA=3.0, torch=2.0, ours_FP8=1.0),
    **outcomes("grouped", FORWARD, ours=2.0, dense_XLA=1.0, dense_torch=9.0),
    **outcomes("grouped", WEIGHTS, ours=2.0, ours_FP8=1.0),
    **outcomes("attention", FORWARD, ours=2.0, cuDNN=3.0, tokamax=2.5),
    **outcomes("attention", BOTH_PASSES, ours=2.0),
    **outcomes("decode", FORWARD, ours=1e-6),
    gpu_steps.OURS: measured(1.0, 3.0, 1.0),
    gpu_steps.OURS_FP8: measured(0.5),
    gpu_steps.EAGER: measured(3.0),
    gpu_steps.COMPILED: Failed("it broke"),
}


def test_figures_compare_with_the_fastest_alternative():
    found = {f.name: f for f in gpu_figures.figures(FABRICATED, CASES)}
    asked = {
        "dense: forward, FP8 / bf16": (2.0, True),
        "grouped: forward, grouped / dense": (0.5, False),
        "grouped: weight gradient, FP8 / bf16": (2.0, True),
        "attention: forward, ours / others": (1.25, True),
        "small: training step, ours / transformers": (3.0, True),
        "small: training step, FP8 / bf16": (2.0, True),
    }
    for name, (value, met) in asked.items():
        assert (found[name].value, found[name].met) == (pytest.approx(value), met)
    # Nothing to compare with, so nothing is said.
    assert "attention: forward and backward, ours / others" not in found
    assert "grouped: weight gradient, grouped / dense" not in found


def test_shares_are_of_what_was_measured_to_be_the_most():
    found = {f.name: f.value for f in gpu_figures.figures(FABRICATED, CASES)}
    ceiling = CASES[0].flops("matmul") / 2e-9
    share = found["grouped: forward, ours / matmul ceiling"]
    assert share == pytest.approx(CASES[2].flops(FORWARD) / 2.0 / ceiling)
    moved, copied = CASES[4].moved_bytes() / 1e-6, CASES[0].moved_bytes() / 2e-9
    assert found["decode: bandwidth / copy"] == pytest.approx(moved / copied)


class Answers:
    """A side without a process."""

    def __init__(self, *answers):
        self.answers, self.asked, self.closed = iter(answers), [], 0

    def ask(self, task, limit=None):
        self.asked.append(task)
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        self.closed += 1


NAMES = [Contender("one", FORWARD, "ours"), Contender("two", FORWARD, "ours")]


def test_a_broken_contender_costs_its_own_result_only():
    side = Answers(RuntimeError("it hangs"), measured(1.0))
    found, left_out = gpu.measure([(c, side) for c in NAMES], Clock(60), print)
    assert found == {NAMES[0]: Failed("it hangs"), NAMES[1]: measured(1.0)}
    assert left_out == [] and side.closed == 1


def test_none_is_started_once_time_is_over(monkeypatch):
    left = itertools.chain([5.0, 5.0, -1.0], itertools.repeat(-2.0))
    clock, said = Clock(0), []
    monkeypatch.setattr(clock, "left", lambda: next(left))
    side = Answers(measured(1.0))
    found, left_out = gpu.measure([(c, side) for c in NAMES], clock, said.append)
    assert (list(found), left_out) == (NAMES[:1], NAMES[1:])
    assert any("left out" in line and str(NAMES[1]) in line for line in said)


def test_a_step_that_cannot_start_is_told_of():
    started = gpu_steps.start(gpu_steps.OF_TORCH, ["torch"], Clock(60))
    said = []
    found, kernels = gpu_steps.measure(started, 1, Clock(60), said.append)
    assert found[gpu_steps.EAGER] == Failed("torch is not installed")
    assert len(found) == len(said) == 2 and kernels == {}


SIDE = """
import os, time

def tasks():
    broken = {"sleep": lambda: time.sleep(60), "exit": lambda: os._exit(7)}
    return {"pid": os.getpid, **broken}
"""


def test_a_side_that_hangs_or_ends_is_started_again(tmp_path, monkeypatch):
    (tmp_path / "gpu_side.py").write_text(SIDE)
    monkeypatch.syspath_prepend(tmp_path)
    with gpu_side.Side("gpu_side.tasks") as side:
        first = side.ask("pid")
        with pytest.raises(RuntimeError, match="no answer within 1 s"):
            side.ask("sleep", limit=1)
        second = side.ask("pid")
        with pytest.raises(RuntimeError, match="exit code 7"):
            side.ask("exit")
        assert len({first, second, side.ask("pid")}) == 3


def test_a_worker_that_takes_too_long_to_start_is_killed(tmp_path, monkeypatch):
    (tmp_path / "slow_side.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="no answer within 1 s"):
        Worker("slow_side.tasks", limit=1)


def test_a_package_that_is_broken_costs_its_own_results_only():
    cases = [
        Contender("ceilings", operation, "XLA") for operation in ("copy", "matmul")
    ]
    sides: Any = [Answers(cases), Answers(RuntimeError("no libcuda"))]
    said = []
    assert gpu.find_contenders(sides, said.append) == [(c, sides[0]) for c in cases]
    assert "no libcuda" in said[0]


def test_where_jax_cant_start_the_suite_is_refused():
    side: Any = Answers(RuntimeError("gpu_jax.side ended with exit code 1"))
    with pytest.raises(ValueError, match="needs a Hopper GPU, and JAX can't start"):
        gpu.find_device(side)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (
            {"platform": "cpu", "name": "cpu", "compute_capability": None},
            "JAX .* on cpu",
        ),
        (
            {"platform": "gpu", "name": "NVIDIA A100", "compute_capability": "8.0"},
            "NVIDIA A100 .* has 8.0",
        ),
    ],
)
def test_other_than_a_hopper_gpu_is_refused(device, said):
    with pytest.raises(ValueError, match=f"needs a Hopper GPU.*{said}"):
        gpu.check_device(device)


def test_the_whole_suite_ends_in_a_report(monkeypatch, tmp_path):
    """It runs as on a GPU, both sides in processes of their own; torch has none."""
    monkeypatch.setattr(gpu, "CASES", (CASES[0], CASES[1]))
    monkeypatch.setattr(gpu, "check_device", lambda device: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(gpu_steps, "workload", lambda: SMALL)
    monkeypatch.setattr(gpu_steps, "OF_JAX", (gpu_steps.OURS,))
    monkeypatch.setattr(gpu_steps, "OF_TORCH", (gpu_steps.EAGER,))
    said = []
    report = gpu.run(1, said.append)
    written = json.loads(report.write(tmp_path).read_text())
    assert report.wrong == () and written["settings"]["left_out"] == []
    figures = {f["name"]: f for f in written["figures"]}
    assert figures["dense: forward, ours FP8"]["value"] > 0
    assert figures["dense: forward, FP8 / bf16"]["at_least"] == 1.5
    assert figures["error of dense: forward, ours FP8"]["met"]
    assert str(gpu_steps.EAGER) in written["samples"]["failed"]
    assert figures[str(gpu_steps.OURS)]["value"] > 0
    (kernels,) = (v for k, v in written["samples"].items() if k.startswith("kernels"))
    assert kernels == {str(gpu_steps.OURS): []}  # a GPU's
    assert str(written["settings"]["seed"]) in said[0]


def test_without_a_gpu_the_script_says_so(script):
    assert "needs a Hopper GPU" in script("bench", "--suite=gpu").mistake()


def test_what_is_said_has_nothing_that_the_terminal_would_format():
    console = rich.console.Console(width=200)
    outcome = Failed("operand bf16[2,3] [/usr/lib] [red]")
    with console.capture() as capture:
        gpu._tell(NAMES[0], outcome, 1.0, console.print)
    assert outcome.reason in capture.get()
