"""A small shape with every part of the model, and random variables for any shape."""

import jax
import pytest

from jmoe.config import MLAConfig, ModelConfig, MoEConfig, RouterConfig, records
from tests import parity

SMALL = ModelConfig(
    vocab_size=48,
    hidden_dim=32,
    num_layers=3,
    num_dense_layers=1,
    dense_mlp_dim=40,
    attention=MLAConfig(
        num_heads=2,
        query_latent_dim=12,
        kv_latent_dim=16,
        nope_dim=6,
        rope_dim=8,
        value_dim=10,
    ),
    moe=MoEConfig(
        expert_mlp_dim=12,
        router=RouterConfig(num_experts=8, top_k=3, num_groups=4, groups_per_token=2),
    ),
)


@pytest.fixture(scope="session")
def small_config():
    """The small shape with `path.to.field=value` assignments applied."""
    return lambda *assignments: records.override(SMALL, assignments)


@pytest.fixture(scope="session")
def random_variables():
    return parity.random_variables


@pytest.fixture(scope="session")
def unstack():
    """A scanned model's collection, layer by layer as an unrolled model names it."""

    def convert(tree):
        layers = {
            f"{kind}_{i}": jax.tree.map(lambda x, i=i: x[i], tree[kind])
            for kind in {"dense", "moe"} & tree.keys()
            for i in range(len(jax.tree.leaves(tree[kind])[0]))
        }
        rest = {name: tree[name] for name in tree.keys() - {"dense", "moe"}}
        return rest | layers

    return convert


@pytest.fixture(scope="session")
def relative_error():
    return parity.relative_error
