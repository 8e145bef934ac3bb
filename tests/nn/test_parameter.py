"""What a model says of each of its parameters."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import meta

from jmoe.config import override
from jmoe.config.model import LAYER_LOOPS
from jmoe.nn.model import Transformer, init_variables, parameter_records
from jmoe.nn.parameter import FP8, INT4, TO_HEADS, Boxed
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
GROUPED_QUERIES = [
    "attention.kind=gqa",
    "attention.num_kv_heads=1",
    "attention.head_dim=12",
    "attention.qk_norm_eps=1e-6",
    "attention.qkv_bias=true",
]
OTHERS = ("embedding", "head", "scale", "router.kernel")


def named(tree, is_leaf=None) -> dict:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}


def boxed_params(cfg):
    shapes = jax.eval_shape(lambda: init_variables(Transformer(cfg), 0))
    return shapes["params"]


def records_of(cfg):
    return named(parameter_records(cfg))


def key_of(name: str) -> str:
    return next(key for key in MATRICES if name.endswith(f".{key}"))


@pytest.mark.parametrize("loop", LAYER_LOOPS)
@pytest.mark.parametrize("latent", ["none", "16"])
def test_a_model_says_of_every_parameter_whether_it_is_a_matrix(loop, latent):
    settings = [f"layer_loop={loop}", f"attention.query_latent_dim={latent}"]
    boxed = boxed_params(override(MODEL, settings))
    found = set()
    for name, box in named(boxed, lambda x: isinstance(x, Boxed)).items():
        shape = box.value.shape
        if not box.record.is_hidden:
            assert name.endswith(OTHERS), name
            continue
        found.add(key_of(name))
        fan_in, fan_out = box.record.matrix.sizes(shape)
        stacked = loop == "scan" and not name.startswith("mtp")
        layers = shape[0] if stacked else 1
        count = box.value.size // (layers * fan_in * fan_out)
        assert (count, fan_in, fan_out) == MATRICES[key_of(name)], name
    queries = {"none": {"query.kernel"}, "16": {"query_down.kernel", "query_up.kernel"}}
    other = queries["16" if latent == "none" else "none"]
    assert found == MATRICES.keys() - other


def test_norms_and_biases_alone_are_never_decayed():
    found = records_of(MODEL)
    kept = {name for name, record in found.items() if not record.decays}
    assert kept == {name for name in found if name.endswith(("scale", "bias"))}


def test_norms_and_routers_alone_compute_in_float32():
    found = records_of(MODEL)
    wide = {n for n, x in found.items() if x.compute_dtype("bfloat16") == jnp.float32}
    assert wide == {n for n in found if n.endswith("scale") or ".router." in n}


def test_of_grouped_queries_all_kernels_are_matrices_and_no_bias_or_norm_is():
    found = records_of(override(MODEL, GROUPED_QUERIES))
    start = "params.moe.attention."
    own = {n.removeprefix(start): x for n, x in found.items() if n.startswith(start)}
    to_heads = {"query.kernel", "key.kernel", "value.kernel"}
    assert {n for n, x in own.items() if x.matrix == TO_HEADS} == to_heads
    assert {n for n, x in own.items() if x.is_hidden} == to_heads | {"out.kernel"}
    vectors = {n: x for n, x in own.items() if x.matrix is None}
    biases = {"query.bias", "key.bias", "value.bias"}
    assert vectors.keys() == biases | {"query_norm.scale", "key_norm.scale"}
    assert all(x.in_float32 and not (x.decays or x.formats) for x in vectors.values())


@pytest.mark.parametrize("loop", LAYER_LOOPS)
def test_a_record_says_which_dimensions_number_layers_experts_and_pairs(loop):
    found = records_of(override(MODEL, [f"layer_loop={loop}"]))
    for name, record in found.items():
        stacked = loop == "scan" and name.startswith(("params.moe.", "params.dense."))
        if ".bias" not in name:
            assert record.is_stacked == stacked, name
        assert record.of_experts == (".experts." in name)
        assert record.num_lead == record.is_stacked + record.of_experts
        assert record.pair_dim == (-2 if "gate_up" in name else None), name


def test_fewer_bits_are_for_matrices_of_attention_and_mlps():
    for name, record in records_of(MODEL).items():
        want = (FP8,) if name.endswith(".kernel") else ()
        if name.endswith(("router.kernel", "project.kernel")):
            want = ()
        assert record.formats == ((FP8, INT4) if ".experts." in name else want), name


def test_one_row_of_an_embedding_is_met_unless_it_is_the_head_too():
    for tied in ("false", "true"):
        found = records_of(override(MODEL, [f"tie_embeddings={tied}"]))
        tables = {name for name, record in found.items() if record.is_table}
        assert tables == ({"params.embedding"} if tied == "false" else set())


def test_a_box_is_opened_named_and_stacked_as_linens_own_is():
    scanned = boxed_params(MODEL)["moe"]["moe"]["experts"]["down"]
    assert [*nn.get_partition_spec(scanned)] == ["layers", "expert", "mlp", "embed"]
    assert meta.unbox(scanned).shape == (1, 8, 16, 32)
