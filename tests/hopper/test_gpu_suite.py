"""All that the GPU benchmark runs on a GPU, compiled for an H20 at its real size."""

import jax
import pytest

from experiments.benchmarks import gpu_jax, gpu_measure, gpu_shapes, gpu_steps
from jmoe.plan import aot
from jmoe.plan.device import H20
from tests.hopper.compiled import compile_tree

pytestmark = pytest.mark.hopper

SUBJECTS = [
    pytest.param(subject, id=f"{case.name}-{subject.operation}-{subject.system}")
    for case in gpu_shapes.CASES
    for subject in gpu_jax.subjects(case)
    if not getattr(case, "skew", False)  # rows that are shared otherwise, no more
    and subject.system != "tokamax"  # whose kernels aren't ours to keep compiling
]
CHECKED = [param for param in SUBJECTS if param.values[0].reference is not None]
KERNEL = 'custom_call_target="mosaic_gpu'


@pytest.fixture
def as_if_on_a_hopper(monkeypatch):
    """cuDNN's asks the GPU that is there which kernels it can run."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


def inputs_of(subject):
    return jax.eval_shape(lambda: subject.make(jax.random.key(0)))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_is_timed_compiles(subject, as_if_on_a_hopper):
    text = compile_tree(gpu_measure.over_sets(subject.function), [[inputs_of(subject)]])
    assert (KERNEL in text) == subject.system.startswith("ours")
    assert ("__cudnn$fmha" in text) == (subject.system == "cuDNN")


@pytest.mark.parametrize("subject", CHECKED)
def test_what_it_is_compared_with_compiles_and_is_no_kernel(subject):
    inputs = inputs_of(subject)
    want = jax.eval_shape(subject.reference, *inputs)
    got = jax.eval_shape(subject.function, *inputs)
    assert KERNEL not in compile_tree(subject.reference, inputs)
    assert KERNEL not in compile_tree(gpu_measure.worst_tile, (got, want))


@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_the_small_step_compiles_and_its_experts_are_kernels(precision):
    run = gpu_steps.workload().run(precision=precision)
    program = aot.compile_step(run, aot.absent_devices(H20, 1))
    assert KERNEL in program.text
    assert program.memory.total < 70 * 2**30  # of an H100's 80 GB
