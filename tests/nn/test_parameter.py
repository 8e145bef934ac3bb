"""What a model says of each of its parameters."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import meta

from jmoe.config import override
from jmoe.config.model import LAYER_LOOPS
from jmoe.nn.model import Transformer
from jmoe.nn.parameter import Described, descriptions
from tests.smallest_run import get_config

MODEL = get_config().model

# How many matrices a layer has, and the inputs and outputs of each, in the smallest
# model; all else is no hidden matrix.
MATRICES = {
    "query.kernel": (1, 32, 2 * 16),
    "query_down.kernel": (1, 32, 16),
    "query_up.kernel": (1, 16, 2 * 16),
    "kv_down.kernel": (1, 32, 16 + 8),
    "kv_up.kernel": (1, 16, 2 * 16),
    "out.kernel": (1, 2 * 8, 32),
    "mlp.gate_up.kernel": (2, 32, 48),
    "mlp.down.kernel": (1, 48, 32),
    "shared.gate_up.kernel": (2, 32, 16),
    "shared.down.kernel": (1, 16, 32),
    "experts.gate_up": (8 * 2, 32, 16),
    "experts.down": (8, 16, 32),
    "project.kernel": (1, 2 * 32, 32),
}
OTHERS = ("embedding", "head", "scale", "router.kernel")


def named(tree, is_leaf=None) -> dict:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}


def boxed_params(cfg):
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), tokens_BT)
    return shapes["params"]


def key_of(name: str) -> str:
    return next(key for key in MATRICES if name.endswith(f".{key}"))


@pytest.mark.parametrize("loop", LAYER_LOOPS)
@pytest.mark.parametrize("latent", ["none", "16"])
def test_a_model_says_of_every_parameter_whether_it_is_a_matrix(loop, latent):
    settings = [f"layer_loop={loop}", f"attention.query_latent_dim={latent}"]
    boxed = boxed_params(override(MODEL, settings))
    found = set()
    for name, box in named(boxed, lambda x: isinstance(x, Described)).items():
        dims, shape = box.description.hidden_matrix, box.value.shape
        if dims is None:
            assert name.endswith(OTHERS), name
            continue
        found.add(key_of(name))
        fan_in, fan_out = dims.sizes(shape)
        stacked = loop == "scan" and not name.startswith("mtp")
        layers = shape[0] if stacked else 1
        count = box.value.size // (layers * fan_in * fan_out)
        assert (count, fan_in, fan_out) == MATRICES[key_of(name)], name
    queries = {"none": {"query.kernel"}, "16": {"query_down.kernel", "query_up.kernel"}}
    other = queries["16" if latent == "none" else "none"]
    assert found == MATRICES.keys() - other


def test_norms_alone_are_never_decayed():
    found = named(descriptions(boxed_params(MODEL)))
    kept = {name for name, description in found.items() if not description.decays}
    assert kept == {name for name in found if name.endswith("scale")}


def test_a_box_is_opened_named_and_stacked_as_linens_own_is():
    scanned = boxed_params(MODEL)["moe"]["moe"]["experts"]["down"]
    assert [*nn.get_partition_spec(scanned)] == ["layers", "expert", "mlp", "embed"]
    assert meta.unbox(scanned).shape == (1, 8, 16, 32)
