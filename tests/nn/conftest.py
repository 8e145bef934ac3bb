"""A small shape with every part of the model, and random variables for any shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jmoe.config import MLAConfig, ModelConfig, MoEConfig, RouterConfig, records
from jmoe.nn.model import Transformer

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
    """Variables of order 1 everywhere, so that every one of them shows in the output.

    Kernels keep the scale of what they multiply, norms are near 1, biases are not 0.
    """

    def draw(cfg: ModelConfig, seed: int = 0):
        rng = np.random.default_rng(seed)

        def leaf(path, shape):
            noise = rng.normal(size=shape.shape)
            name = path[-1].key
            if name == "scale":
                noise = 1 + 0.2 * noise
            elif name == "bias":
                noise = 0.1 * noise
            elif name != "embedding":
                noise *= 0.2
            return jnp.asarray(noise, jnp.float32)

        tokens_BT = jnp.zeros((1, 2), jnp.int32)
        shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), tokens_BT)
        return jax.tree_util.tree_map_with_path(leaf, nn.unbox(shapes))

    return draw


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
    """The largest error, relative to the largest entry.

    Entries that come out small do so by cancellation, and carry the rounding of the
    large terms they are made of.
    """
    return lambda got, want: np.abs(np.asarray(got) - want).max() / np.abs(want).max()
