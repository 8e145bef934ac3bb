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
