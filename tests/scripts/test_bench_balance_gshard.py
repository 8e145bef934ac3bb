"""The benchmark of GShard's scheme trains what it says, and counts to the same loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from experiments.benchmarks import balance_gshard, balance_runs, gshard
from experiments.benchmarks.balance_gshard import SCHEMES, TRADITIONAL, Scheme
from experiments.benchmarks.balance_runs import OURS, WAYS, Recorded
from jmoe.config import override
from jmoe.nn.choices import Routing
from jmoe.nn.moe import MoE


def recorded(*losses: float) -> Recorded:
    steps = np.arange(1, len(losses) + 1)
    return Recorded(np.ones((4, 1, 64)), np.full(4, 0.1), steps, np.array(losses), {})


@pytest.fixture(scope="module")
def experts():
    """Weights of 64 experts and a routing of 64 tokens, 6 experts each, in 4 groups."""
    cfg = balance_runs.config().model.moe.router
    keys = jax.random.split(jax.random.key(0), 5)
    weights = {
        "gate_up": jax.random.normal(keys[0], (64, 8, 2, 4)),
        "down": jax.random.normal(keys[1], (64, 4, 8)),
    }
    x_ND = jax.random.normal(keys[2], (64, 8))
    score_NE = jax.random.normal(keys[3], (64, 64)) + jnp.linspace(0, 2, 64)
    gate_NK, expert_NK = jax.lax.top_k(jax.nn.sigmoid(score_NE), 6)
    return cfg, weights, x_ND, Routing(expert_NK, gate_NK)


@pytest.mark.parametrize("factor", [1.0, 1.25, 4.0])
def test_indices_bring_tokens_where_einsums_do(experts, factor):
    cfg, weights, x_ND, routing = experts
    (by_einsum, dropped), (by_index, _) = (
        gshard.capacity_experts(
            weights, x_ND, routing, cfg, capacity_factor=factor, way=way
        )
        for way in gshard.WAYS
    )
    np.testing.assert_allclose(by_einsum, by_index, rtol=1e-5, atol=1e-5)
    count_GE = jax.vmap(lambda e: jnp.bincount(e.ravel(), length=64))(
        routing.expert_NK.reshape(gshard.GROUPS, -1, 6)
    )
    places = gshard.capacity(64, cfg, gshard.GROUPS, factor)
    assert dropped == jnp.maximum(count_GE - places, 0).sum() > 0


def test_within_the_context_a_layer_drops_what_is_beyond_the_capacity():
    layer = MoE(balance_runs.config().model.moe, 0.1)
    x_BSD = jax.random.normal(jax.random.key(1), (2, 32, 16))
    variables = meta.unbox(layer.init(jax.random.key(0), x_BSD))
    whole_BSD, _ = layer.apply(variables, x_BSD)
    with balance_runs.with_capacity(1.0):
        tight_BSD, measured = layer.apply(variables, x_BSD)
    with balance_runs.with_capacity(64.0):
        roomy_BSD, _ = layer.apply(variables, x_BSD)
    assert measured.load.dropped_receiving > 0
    np.testing.assert_allclose(roomy_BSD, whole_BSD, rtol=1e-4, atol=1e-5)
    assert np.abs(tight_BSD - whole_BSD).max() > 1e-3


def test_traditional_runs_differ_in_how_they_balance_alone():
    ours, other = (balance_runs.config(way) for way in (OURS, "GShard, capacity 2"))
    assert other.model.moe.router.auxiliary_loss == "switch"
    assert other.train.bias_rate.first == other.train.bias_rate.last == 0
    assert ours.train.bias_rate.first > 0
    assert override(ours, balance_runs.TRADITIONAL) == other
    assert all(WAYS[s.run].capacity_factor == s.factor for s in TRADITIONAL)


def test_tokens_are_counted_to_the_higher_of_two_ends():
    ours, theirs = recorded(4.0, 3.0, 2.0), recorded(4.0, 3.5, 3.0)
    tokens = balance_runs.tokens_a_step()
    assert balance_gshard.tokens_to(2.5, [ours]) == 2.5 * tokens
    assert balance_gshard.tokens_to(3.25, [theirs, theirs]) == 2.5 * tokens
    runs = dict.fromkeys(WAYS, [theirs, theirs]) | {OURS: [ours, ours]}
    found = {x.name: x for x in balance_gshard.loss_figures(runs)}
    ratio = found["tokens to the same validation loss, GShard, capacity 2, over ours"]
    assert ratio.value == 1.5
    assert found[f"validation loss, {OURS}"].value == 2.0
    assert found["choices dropped, GShard, capacity 2"].value == pytest.approx(10)


def test_places_are_computed_whether_taken_or_not():
    cfg, tokens = balance_runs.config().model, balance_runs.tokens_a_step()
    ours, *others = (
        balance_gshard.operations(cfg, tokens, scheme) for scheme in SCHEMES
    )
    assert all(other > ours for other in others)
    rows = balance_gshard.padding(cfg, 2048, Scheme("GShard, capacity 2", "index"))
    assert rows == (2.0, 12.0, 0.0)
    einsum = balance_gshard.padding(cfg, 2048, Scheme("GShard, capacity 2", "einsum"))
    assert einsum.flops == 5 * 2 * 2048 * (2 * 512 * 6) * 128
    experts = 18 * 6 * cfg.hidden_dim * cfg.moe.expert_mlp_dim * cfg.num_moe_layers
    twice = balance_gshard.operations(
        cfg, tokens, Scheme("GShard, capacity 2", "index")
    )
    assert twice - ours == pytest.approx(experts)
