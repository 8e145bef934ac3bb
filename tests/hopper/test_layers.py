"""An MoE layer that lends experts, compiled for H20s."""

import pytest

from experiments.benchmarks.hopper_balance import LOANS, of_loans
from jmoe.config import ExchangeConfig, MeshConfig, ModelConfig, override
from jmoe.plan import layers, programs, summary

pytestmark = pytest.mark.hopper

SLOTS = 2


@pytest.fixture(scope="module")
def layer():
    small = [
        "hidden_dim=512",
        "moe.expert_mlp_dim=256",
        "moe.router.num_experts=16",
        "moe.router.top_k=2",
    ]
    run = programs.run_on(
        override(ModelConfig.preset("v2_lite"), small),
        MeshConfig(expert=4),
        "small",
        exchange=ExchangeConfig(backend="balanced", slots=SLOTS),
        length=1024,
    )
    return layers.compile_layer(run)


def test_experts_are_lent_and_given_back_one_by_one_and_never_gathered(layer):
    for what, count in {
        "lent": 2 * SLOTS,
        "lent again": 0,
        "given back": 2 * SLOTS,
    }.items():
        assert len(of_loans(layer, what)) == count, what
    assert summary.batch_gathers(layer) == []
    assert set(LOANS) == {"lent", "lent again", "given back"}


@pytest.mark.parametrize("what", ["lent", "given back"])
def test_products_hide_the_way_of_lent_experts_and_of_their_gradients(layer, what):
    assert summary.hidden(of_loans(layer, what)) >= 0.5
