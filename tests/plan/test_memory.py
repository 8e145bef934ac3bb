"""What weights take: by the plan, and by the arrays themselves."""

import functools

import jax
import pytest

from jmoe.config import ModelConfig, override
from jmoe.nn.quantized import FORMS
from jmoe.plan import memory

# Every part of V3, scaled down: dimensions that blocks and groups do not divide.
SCALED = [
    "vocab_size=512",
    "hidden_dim=192",
    "num_layers=3",
    "num_dense_layers=1",
    "dense_mlp_dim=300",
    "attention.num_heads=2",
    "attention.query_latent_dim=72",
    "attention.kv_latent_dim=40",
    "moe.expert_mlp_dim=80",
    "moe.router.num_experts=16",
]


GROUPED_QUERIES = [
    "attention.kind=gqa",
    "attention.num_kv_heads=1",
    "attention.head_dim=72",
    "attention.qkv_bias=true",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_scaled_down_model_takes_what_the_plan_says(form, loop):
    cfg = override(ModelConfig.preset("v3"), [*SCALED, f"layer_loop={loop}"])
    made = jax.jit(functools.partial(memory.make_weights, cfg, form))()
    parts = memory.weights(cfg, form)
    assert sum(part.size for part in parts.values()) == sum(
        x.nbytes for x in jax.tree.leaves(made)
    )
    experts = [
        x.nbytes
        for path, x in jax.tree.leaves_with_path(made)
        if "experts" in str(path)
    ]
    assert parts["routed experts"].size == sum(experts)
    assert set(parts) == set(memory.PARTS)


def test_grouped_queries_have_kernels_and_float32_biases_in_every_layer():
    cfg = override(ModelConfig.preset("v3"), [*SCALED, *GROUPED_QUERIES])
    native, small = (memory.weights(cfg, form)["attention"] for form in FORMS[:2])
    layers, kernels, biases = 4, 192 * 72 * (2 + 1 + 1 + 2), 72 * (2 + 1 + 1)
    assert native.weights == small.weights == layers * (kernels + biases)
    assert native.size == layers * (2 * kernels + 4 * biases)
    blocks = (
        2 * 2 + 2 * 2 + 2 + 2
    )  # of the query's, the output's, the key's and value's
    assert small.size == layers * (kernels + 4 * blocks + 4 * biases)


def test_v3_keeps_a_latent_and_a_key_of_each_token_and_grouped_queries_their_heads():
    v3 = ModelConfig.preset("v3")
    assert memory.cached_bytes(v3) == 62 * (512 + 64) * 2
    grouped = override(v3, GROUPED_QUERIES)
    assert memory.cached_bytes(grouped) == 62 * 2 * 72 * 2


def test_v3_with_4_bit_experts_fits_in_436_gb():
    cfg = ModelConfig.preset("v3")
    native, small = (memory.weights(cfg, form) for form in ("native", "int4-experts"))
    total = sum(part.size for part in small.values())
    assert total <= 436 * memory.GB
    # 671B parameters and an MTP module of 11.5B that shares embedding and head.
    counted = sum(part.weights for part in native.values())
    assert 682e9 < counted < 684e9
    assert small["routed experts"].bits == pytest.approx(4.5)
    assert small["attention"].bits == pytest.approx(8, rel=1e-2)
    for part in ("embedding", "head", "routers", "norms"):
        assert small[part] == native[part]


def test_fp8_takes_a_byte_and_a_scale_for_each_block():
    parts = memory.weights(ModelConfig.preset("v3"), "fp8")
    assert parts["routed experts"].bits == pytest.approx(8 + 32 / 128**2)
