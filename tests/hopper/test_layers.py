"""An MoE layer that lends experts, compiled for H20s."""

import dataclasses

import pytest

from experiments.benchmarks.hopper_balance import LOANS, of_loans
from jmoe.config import ExchangeConfig, MeshConfig, ModelConfig, override
from jmoe.plan import layers, programs, summary

pytestmark = pytest.mark.hopper

SLOTS = 2
MATRICES = "gate_up", "down"


@pytest.fixture(scope="module")
def run():
    small = [
        "hidden_dim=512",
        "moe.expert_mlp_dim=256",
        "moe.router.num_experts=16",
        "moe.router.top_k=2",
    ]
    return programs.run_on(
        override(ModelConfig.preset("v2_lite"), small),
        MeshConfig(expert=4),
        "small",
        exchange=ExchangeConfig(backend="balanced", slots=SLOTS),
        length=1024,
    )


@pytest.fixture(scope="module")
def layer(run):
    return layers.compile_layer(run)


@pytest.fixture(scope="module")
def in_fp8(run):
    return layers.compile_layer(dataclasses.replace(run, precision="fp8"))


def test_experts_are_lent_and_given_back_one_by_one_and_never_gathered(layer):
    for what, count in {
        "lent": len(MATRICES) * SLOTS,
        "lent again": 0,
        "given back": len(MATRICES) * SLOTS,
    }.items():
        assert len(of_loans(layer, what)) == count, what
    assert summary.batch_gathers(layer) == []
    assert set(LOANS) == {"lent", "lent again", "given back"}


@pytest.mark.parametrize("what", ["lent", "given back"])
def test_products_hide_the_way_of_lent_experts_and_of_their_gradients(layer, what):
    assert summary.hidden(of_loans(layer, what)) >= 0.5


def test_in_fp8_weights_are_lent_as_e4m3_with_their_scales_and_gradients_as_they_are(
    layer, in_fp8
):
    def dtypes(what):
        found = of_loans(in_fp8, what)
        return sorted(shape.split("[")[0] for c in found for shape in c.shapes)

    count = len(MATRICES) * SLOTS
    assert dtypes("lent") == ["f32"] * count + ["f8e4m3fn"] * count
    assert dtypes("given back") == ["bf16"] * count
    sent = [
        sum(c.operand_bytes for c in of_loans(program, "lent"))
        for program in (in_fp8, layer)
    ]
    assert sent[0] / sent[1] == pytest.approx(0.5, rel=0.001)
    assert summary.batch_gathers(in_fp8) == []


@pytest.mark.parametrize("what", ["lent", "given back"])
def test_in_fp8_too_a_product_hides_the_way_of_lent_experts_and_gradients(in_fp8, what):
    """A product is in the way of each matrix, in one of the slots at least."""
    for shape in {c.shapes for c in of_loans(in_fp8, what)}:
        spans = [c.gemms or 0 for c in of_loans(in_fp8, what) if c.shapes == shape]
        assert max(spans) >= 1, shape
