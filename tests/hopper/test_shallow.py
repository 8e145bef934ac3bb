"""What travels, and what it hides behind, in a step of two layers at full width."""

import re

import pytest

from jmoe.config import MeshConfig
from jmoe.plan import aot, hlo, summary
from jmoe.plan.device import H20
from tests.hopper.conftest import shallow_run

pytestmark = pytest.mark.hopper

BOTH = pytest.mark.parametrize("program", ["by_data_and_expert", "by_tensor_too"])


@pytest.fixture
def shallow(program, request):
    return request.getfixturevalue(program)


def test_the_optimizers_memory_falls_as_the_data_axis_grows():
    held = {}
    for data in (1, 2, 4):
        run = shallow_run(MeshConfig(data=data, expert=4))
        _, state, _ = aot.abstract_step(run, aot.absent_devices(H20, 4 * data))
        held[data] = aot.device_bytes(state.opt_state)
    for data, size in held.items():
        assert size * data == pytest.approx(held[1], rel=0.05), held


@BOTH
def test_the_compiler_agrees_on_what_a_device_holds(shallow):
    memory = shallow.summary.memory
    held = memory.parameters + memory.optimizer
    assert held <= memory.arguments <= held + 2**20
    assert memory.aliased >= held


@BOTH
def test_weights_are_gathered_and_gradients_scattered_once_a_step(shallow):
    found, run = shallow.summary, shallow.summary.run
    step = [c for c in found.collectives if c.phase == "step"]
    large = [c for c in step if c.moved_bytes > summary.SMALL]
    assert {c.times for c in large} == {1}
    assert {c.kind for c in large} == {"all-gather", "reduce-scatter"}
    sent = {c.kind: 0 for c in large}
    for c in large:
        sent[c.kind] += c.moved_bytes
    # Whole weights in bfloat16, of which this device had its part; and gradients in
    # float32.
    whole = found.memory.parameters * run.mesh.data
    assert sent["all-gather"] > 0.4 * whole / 2
    assert sent["reduce-scatter"] == pytest.approx(2 * sent["all-gather"], rel=0.1)


@BOTH
def test_gradients_are_summed_in_float32_and_nothing_has_copies(shallow):
    sums = summary.gradient_sums(shallow.summary)
    assert any(c.moved_bytes > summary.SMALL for c in sums)
    assert summary.in_bfloat16(sums) == []
    assert summary.held_ratio(shallow.summary.memory) < 1.03


@BOTH
def test_no_pass_gathers_weights_or_other_devices_tokens(shallow):
    assert summary.batch_gathers(shallow.summary) == []


@BOTH
def test_no_logits_travel(shallow):
    run = shallow.summary.run
    columns = run.model.vocab_size // run.mesh.tensor
    passes = [c for c in shallow.summary.collectives if c.phase != "step"]
    assert passes
    for c in passes:
        assert not any(re.search(rf"\b{columns}\b", shape) for shape in c.shapes), c


def test_a_token_goes_once_to_each_device_that_it_needs(by_data_and_expert):
    assert 1 <= summary.dispatch_ratio(by_data_and_expert.summary) <= 1.1


def test_tokens_travel_in_eight_bits_and_results_in_sixteen(by_tensor_too):
    hidden = by_tensor_too.summary.run.model.hidden_dim
    in_8_bits = hidden + 4 * hidden // 128  # with a float32 scale for 128 numbers
    wide = {f"u8[{in_8_bits}]", f"bf16[{hidden}]"}
    for phase in ("forward", "backward"):
        exchanges = [
            re.sub(r"\[\d+,(\d+)\].*", r"[\1]", c.shapes[0])
            for c in by_tensor_too.summary.collectives
            if c.kind == "ragged-all-to-all" and c.phase == phase
        ]
        choices = f"f32[{2 * by_tensor_too.summary.run.model.moe.router.top_k}]"
        assert set(exchanges) == wide | {choices}


@BOTH
def test_half_of_the_backward_passes_exchanges_have_products_meanwhile(shallow):
    exchanges = [
        c
        for c in shallow.summary.collectives
        if c.phase == "backward" and c.kind.endswith("all-to-all")
    ]
    assert summary.hidden(exchanges) >= 0.5


def kernels(shallow, *, of_attention):
    """Calls of kernels that multiply, each of a loop's body once."""
    program = hlo.parse(shallow.text)
    return [
        instruction
        for executed in program.executed()
        for instruction in executed.instructions
        if "mosaic_gpu" in instruction.attributes
        and instruction.opcode == "custom-call"
        and "/fp8_rows/" not in instruction.op_name  # what travels is quantized by it
        and ("/attention/" in instruction.op_name) == of_attention
    ]


@BOTH
def test_experts_take_two_kernels_forward_and_five_backward(shallow):
    chunks = shallow.summary.run.model.moe.exchange.chunks
    # Each of them for a chunk's first segment, and for those that follow.
    assert len(kernels(shallow, of_attention=False)) == (2 + 5) * 2 * chunks


@BOTH
def test_attention_takes_a_kernel_forward_and_three_backward(shallow):
    """One of the three is the forward pass, computed again."""
    layers = 1 + 1  # the dense one, and the others' loop
    assert len(kernels(shallow, of_attention=True)) == (1 + 3) * layers
