"""The whole model against transformers' `DeepseekV3ForCausalLM`, number by number.

Both get the same random weights and selection biases.
"""

import numpy as np
import pytest

from tests.parity import by_expert, hf_tensors, run_jmoe, run_transformers

TOLERANCE = 1e-5
B, T = 2, 19
CASES = {
    "v3": (
        "layer_loop=unroll",
        "moe.router.gate_scale=2.5",
        "max_positions=640",
        "attention.yarn={'factor': 40.0, 'original_positions': 16}",
    ),
    "v2_lite": (
        "layer_loop=unroll",
        "num_layers=2",
        "attention.query_latent_dim=none",
        "attention.block_size=8",
        "moe.num_shared_experts=2",
        "moe.router.num_groups=1",
        "moe.router.groups_per_token=1",
        "moe.router.normalize_gates=false",
        "norm_eps=0.01",
    ),
    "unequal_mscales": (
        "layer_loop=unroll",
        "num_layers=2",
        "tie_embeddings=true",
        "moe.num_shared_experts=0",
        "moe.router.groups_per_token=1",
        "moe.router.top_k=2",
        "attention.rope_theta=500.0",
        "max_positions=512",
        "attention.yarn={'factor': 8.0, 'original_positions': 64, 'mscale': 1.0, "
        "'mscale_all_dim': 0.5}",
    ),
    "scan": (
        "layer_loop=scan",
        "num_layers=4",
        "num_dense_layers=2",
        "attention.block_size=8",
        "max_positions=512",
        "attention.yarn={'factor': 8.0, 'original_positions': 64, 'mscale': None, "
        "'mscale_all_dim': None}",
    ),
}


@pytest.fixture(scope="module", params=CASES)
def measured(request, small_config, random_variables):
    """The same model on both sides: (jmoe's, transformers')."""
    cfg = small_config(*CASES[request.param])
    variables = random_variables(cfg)
    tokens_BT = np.random.default_rng(1).integers(0, cfg.vocab_size, (B, T))
    theirs = run_transformers(cfg, hf_tensors(variables, cfg), tokens_BT)
    return run_jmoe(cfg, variables, tokens_BT), theirs


UNROLLED = pytest.mark.parametrize("measured", set(CASES) - {"scan"}, indirect=True)


def test_logits_loss_and_all_gradients_are_equal(measured, relative_error):
    ours, theirs = measured
    assert relative_error(ours.logits, theirs.logits) < TOLERANCE
    assert relative_error(ours.loss, theirs.loss) < TOLERANCE
    for name, gradient in ours.gradients.items():
        assert relative_error(gradient, theirs.gradients[name]) < TOLERANCE, name


@UNROLLED
def test_hidden_states_of_every_layer_are_equal(measured, relative_error):
    ours, theirs = measured
    assert len(ours.hidden) == len(theirs.hidden)
    for got, want in zip(ours.hidden, theirs.hidden, strict=True):
        assert relative_error(got, want) < TOLERANCE


@UNROLLED
def test_every_router_chooses_the_same_experts_with_the_same_gates(
    measured, relative_error
):
    ours, theirs = measured
    for got, want in zip(ours.routing, theirs.routing, strict=True):
        # The order of a token's experts is free: sort both by expert.
        (got_NK, got_gate_NK), (want_NK, want_gate_NK) = map(by_expert, (got, want))
        np.testing.assert_array_equal(got_NK, want_NK)
        assert relative_error(got_gate_NK, want_gate_NK) < TOLERANCE
