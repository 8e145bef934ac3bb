"""Summaries of a step that is compiled for CPUs, and of one that is made up."""

import dataclasses
import math
import re

import jax
import pytest

from jmoe.config import ExchangeConfig, MeshConfig, ModelConfig, OptimizerConfig
from jmoe.config.presets import tiny_model
from jmoe.plan import aot, programs, summary, traffic
from jmoe.plan.device import H20
from jmoe.plan.traffic import Collective


def small_run(**mesh):
    model = dataclasses.replace(tiny_model(), num_layers=2, mtp_depth=0)
    exchange = ExchangeConfig(chunks=2)
    return programs.run_on(
        model, MeshConfig(**mesh), "small", exchange=exchange, length=64
    )


@pytest.fixture(scope="module")
def compiled():
    run = small_run(data=2, expert=4)
    return run, aot.compile_step(run, jax.devices()[:8])


def test_arguments_are_parameters_the_optimizers_and_a_batch(compiled):
    run, program = compiled
    memory = program.memory
    # Adam's two moments and step; then biases, tokens with their documents (which
    # say where padding is), and the step.
    assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=1e-4)
    rest = memory.arguments - memory.parameters - memory.optimizer
    batch = 2 * 4 * programs.MICROBATCHES * (run.data.sequence_length + 1)
    biases = 4 * run.model.num_moe_layers * run.model.moe.router.num_experts
    assert batch + biases <= rest <= batch + biases + 64
    assert memory.total == memory.arguments + memory.temporaries + (
        memory.outputs - memory.aliased
    )


def test_the_state_is_donated_and_compiling_is_measured(compiled):
    _, program = compiled
    assert program.memory.aliased >= 0.99 * (
        program.memory.parameters + program.memory.optimizer
    )
    assert program.seconds > 0
    assert program.host_bytes > program.memory.total


def test_the_optimizers_part_alone_overwrites_gradients_weights_and_its_state():
    run = small_run(data=2, expert=4)
    run = dataclasses.replace(run, optimizer=OptimizerConfig(name="muon"))
    program = aot.compile_optimizer(run, jax.devices()[:8])
    memory = program.memory
    held = 2 * memory.parameters + memory.optimizer
    assert held == pytest.approx(memory.arguments, rel=1e-3)
    assert memory.aliased >= 0.99 * held
    found = traffic.collectives(program.text, run.mesh.shape)
    assert {c.kind for c in found} == {"all-to-all", "all-reduce"}  # of clipping


def test_a_device_holds_its_part_of_an_array():
    run = small_run(data=2, expert=4)
    _, alone, _ = aot.abstract_step(small_run(), jax.devices()[:1])
    _, state, _ = aot.abstract_step(run, jax.devices()[:8])
    whole, part = (aot.device_bytes(s.params) for s in (alone, state))
    assert part == pytest.approx(whole / 8, rel=0.01)


def test_a_state_without_copies_is_held_evenly(compiled):
    _, program = compiled
    assert summary.held_ratio(program.memory) == pytest.approx(1, rel=0.01)


def test_copies_of_weights_count_as_those_of_their_gradients_do():
    memory = aot.Memory(
        parameters=4,
        optimizer=5,
        parameters_even=2,
        optimizer_even=4,
        arguments=9,
        outputs=9,
        aliased=9,
        temporaries=0,
    )
    assert summary.held_ratio(memory) == (4 + 4 + 5) / (2 + 2 + 4)


def test_all_gradients_are_among_the_sums(compiled):
    run, program = compiled
    found = made_up(compiled, traffic.collectives(program.text, run.mesh.shape))
    scattered = [c for c in summary.gradient_sums(found) if c.kind == "reduce-scatter"]
    left = sum(c.times * c.operand_bytes / c.devices for c in scattered)
    assert left == pytest.approx(program.memory.parameters, rel=0.01)


def test_activations_are_not_among_the_sums_of_gradients(compiled):
    given = {"kind": "reduce-scatter", "shapes": ("f32[4]", "bf16[8]{0}")}
    ours = [
        collective(**given, phase="step", axes=("tensor",)),
        collective(**given, phase="backward", axes=("data", "tensor")),
        collective(kind="all-reduce", phase="step", axes=("expert",)),
    ]
    others = [
        collective(**given, phase="backward", axes=("tensor",)),
        collective(kind="all-gather", phase="step"),
        collective(phase="backward"),
    ]
    found = summary.gradient_sums(made_up(compiled, [*others, *ours]))
    assert found == ours
    assert summary.in_bfloat16([*found, collective(shapes=("f32[2]",))]) == ours


def collective(**given):
    defaults = {
        "kind": "all-to-all",
        "shapes": ("bf16[4,8]",),
        "operand_bytes": 64,
        "axes": ("expert",),
        "devices": 4,
        "times": 1,
        "phase": "forward",
        "spans": None,
        "op_name": "",
    }
    return Collective(**(defaults | given))


def made_up(compiled, collectives):
    """A summary of a program with other collectives."""
    run, program = compiled
    return summary.Summary(
        run=run,
        device=H20,
        memory=program.memory,
        collectives=collectives,
        copied_bytes=0,
        seconds=1.0,
        cpu_seconds=1.0,
        host_bytes=1,
    )


def test_hidden_counts_runs_and_not_instructions():
    often, once = collective(times=3, spans={"step": 2}), collective(spans={})
    assert summary.hidden([often, once]) == 3 / 4
    assert math.isnan(summary.hidden([]))


def test_traffic_adds_up_what_is_of_one_phase_kind_and_axes(compiled):
    collectives = [
        collective(times=3, spans={"step": 1}),
        collective(operand_bytes=640),
        collective(phase="backward"),
        collective(axes=("data",), devices=2),
    ]
    found = made_up(compiled, collectives).traffic()
    rows = [(t.phase, t.axes, t.times, t.sent_bytes) for t in found]
    assert rows == [
        ("forward", ("expert",), 4, 3 * 48 + 480),
        ("forward", ("data",), 1, 32),
        ("backward", ("expert",), 1, 48),
    ]


def test_every_program_is_of_as_many_devices_as_its_name_says():
    for name, make in programs.PROGRAMS.items():
        run = make()
        assert run.name == name
        ((preset_name, devices),) = re.findall(r"^(\w+?)_(\d+)(?:_|$)", name)
        assert run.mesh.num_devices == int(devices)
        preset = ModelConfig.preset(preset_name)
        assert run.model.num_layers == preset.num_layers
