"""Figures of compiled exchanges compare each with those of its own size."""

import dataclasses

import pytest

from experiments.benchmarks import hopper_balance
from jmoe.plan import programs
from jmoe.plan.aot import Memory
from jmoe.plan.decision import PlanCost
from jmoe.plan.device import H20
from jmoe.plan.summary import Summary
from jmoe.plan.traffic import Collective

SENT = Collective(
    kind="ragged-all-to-all",
    shapes=("bf16[32,7168,2,2048]{3,2,1,0}",),
    operand_bytes=32 * 1000,
    axes=("expert",),
    devices=8,
    times=1,
    phase="step",
    spans={"forward": 2},
    op_name="",
)
ROWS = dataclasses.replace(SENT, shapes=("bf16[32,7168]{1,0}",))
RARE = dataclasses.replace(SENT, optional=True)
BACK = dataclasses.replace(SENT, shapes=("bf16[1,2048,7168]{2,1,0}",), spans={})


def program(name: str, temporaries: int, *collectives: Collective) -> Summary:
    return Summary(
        run={**programs.LAYERS, **programs.LENDING_STEPS}[name](),
        device=H20,
        memory=Memory(
            arguments=0,
            outputs=0,
            aliased=0,
            temporaries=temporaries,
            parameters=0,
            optimizer=0,
            parameters_even=0.0,
            optimizer_even=0.0,
        ),
        collectives=collectives,
        copied_bytes=0,
        seconds=0.0,
        cpu_seconds=0.0,
        host_bytes=0,
    )


def figures(*found: Summary, costs=None):
    by_name = {one.run.name: one for one in found}
    report = hopper_balance.make_report(by_name, costs or {})
    return {figure.name: figure for figure in report.figures}


def test_temporaries_are_held_against_those_of_the_same_size():
    found = figures(
        program("v3_layer_8_capacity", 1),
        program("v3_layer_16_balanced", 60),
        program("v3_layer_16_capacity", 50),
        program("v3_layer_16_dropless", 120),
    )
    to_capacity = found["v3_layer_16_balanced: temporaries / capacity's"]
    to_dropless = found["v3_layer_16_balanced: temporaries / dropless's"]
    assert (to_capacity.value, to_capacity.met) == (pytest.approx(1.2), False)
    assert (to_dropless.value, to_dropless.met) == (pytest.approx(0.5), True)


def test_a_plans_time_is_held_against_its_layers():
    name = "v3_layer_8_balanced"
    cost = PlanCost(kernels=21, moved_bytes=0, seconds=2e-3, floor_seconds=0.4)
    found = figures(program(name, 1), costs={name: cost})
    assert found[f"{name}: a plan's kernels"].met is False
    share = found[f"{name}: a plan's time / the layer's floor"]
    assert (share.value, share.met) == (pytest.approx(0.5), True)


def test_loans_are_what_has_experts_and_is_not_rare():
    lending = program("v3_layer_8_balanced", 1, SENT, SENT, ROWS, RARE, BACK)
    assert hopper_balance.of_loans(lending, "lent") == [SENT, SENT]
    assert hopper_balance.of_loans(lending, "lent again") == []
    assert hopper_balance.of_loans(lending, "given back") == [BACK]
    found = figures(lending)
    assert found["v3_layer_8_balanced: bytes of loans"].value == pytest.approx(2e-3)
    assert found["v3_layer_8_balanced: products meanwhile, lent"].met
    assert not found["v3_layer_8_balanced: products meanwhile, given back"].met


def test_loans_in_fp8_are_held_against_those_in_bfloat16():
    in_fp8, scales = (
        dataclasses.replace(SENT, shapes=(shape,), operand_bytes=size)
        for shape, size in {
            "f8e4m3fn[8,2048,2816]{2,1,0}": 8 * 1000,
            "f32[8,16,22]{2,1,0}": 8 * 2,
        }.items()
    )
    native = dataclasses.replace(
        SENT, shapes=("bf16[8,2048,2,1408]{3,2,1,0}",), operand_bytes=8 * 2000
    )
    name = programs.IN_FP8

    def found(*lent):
        return figures(
            program("v2_lite_8_balanced", 1, native), program(name, 1, *lent)
        )

    share, ratio = f"{name}: loans in e4m3", f"{name}: bytes of loans / bfloat16's"
    narrow = found(in_fp8, scales)
    assert narrow[ratio].value == pytest.approx(1002 / 2000)
    assert narrow[share].value == pytest.approx(1000 / 1002)
    assert found(native)[share].value == 0
    assert not found(native)[ratio].met and not found(native)[share].met
    assert "v2_lite_8_balanced: loans in e4m3" not in narrow
