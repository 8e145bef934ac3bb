"""The model's records: what they derive, and the impossible shapes they refuse."""

import dataclasses
import math

import pytest

from jmoe.config import records
from jmoe.config.attention import GQAConfig, MLAConfig, YarnConfig
from jmoe.config.model import (
    DenseConfig,
    ExchangeConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)

YARN = "attention.yarn={'factor': 4, 'original_positions': 256}"


def attention(**changes):
    fields = {
        "num_heads": 4,
        "query_latent_dim": None,
        "kv_latent_dim": 64,
        "nope_dim": 32,
        "rope_dim": 16,
        "value_dim": 32,
    }
    return MLAConfig(**fields | changes)


@pytest.mark.parametrize(
    "assignment, said",
    [
        ("vocab_size=1", "vocab_size=1 must be at least 2."),
        ("hidden_dim=0", "hidden_dim=0 must be at least 1."),
        ("num_layers=0", "num_layers=0 must be at least 1."),
        ("num_dense_layers=-1", "num_dense_layers=-1 must be at least 0."),
        (
            "num_dense_layers=4",
            "num_dense_layers=4 must be below num_layers=4: at least one layer is a "
            "MoE layer.",
        ),
        ("dense_mlp_dim=0", "dense_mlp_dim=0 must be at least 1."),
        ("max_positions=0", "max_positions=0 must be at least 1."),
        ("mtp_depth=-1", "mtp_depth=-1 must be at least 0."),
        ("norm_eps=-1e-6", "norm_eps=-1e-06 must be at least 0.0."),
        ("init_std=-0.1", "init_std=-0.1 must be at least 0.0."),
        ("dtype=float16", "dtype='float16' is not one of 'float32', 'bfloat16'."),
        ("remat=all", "remat='all' is not one of 'none', 'block', 'save_dots'."),
        ("layer_loop=for", "layer_loop='for' is not one of 'scan', 'unroll'."),
        ("hf_extras=oops", "hf_extras='oops' must be a JSON object."),
        ("hf_extras='[]'", "hf_extras='[]' must be a JSON object."),
        ("attention.num_heads=0", "num_heads=0 must be at least 1."),
        ("attention.query_latent_dim=0", "query_latent_dim=0 must be at least 1."),
        ("attention.kv_latent_dim=0", "kv_latent_dim=0 must be at least 1."),
        ("attention.nope_dim=0", "nope_dim=0 must be at least 1."),
        ("attention.rope_dim=0", "rope_dim=0 must be at least 2."),
        ("attention.rope_dim=15", "rope_dim=15 must be even, to rotate pairs."),
        ("attention.value_dim=0", "value_dim=0 must be at least 1."),
        ("attention.rope_theta=0", "rope_theta=0.0 must be at least 1.0."),
        ("attention.rope_theta=nan", "rope_theta=nan must be at least 1.0."),
        ("attention.latent_norm_eps=-1", "latent_norm_eps=-1.0 must be at least 0.0."),
        ("attention.block_size=0", "block_size=0 must be at least 1."),
        ("attention.yarn.factor=0.5", "factor=0.5 must be at least 1.0."),
        (
            "attention.yarn.original_positions=0",
            "original_positions=0 must be at least 1.",
        ),
        (
            "attention.yarn.beta_slow=64",
            "beta_slow=64.0 must be above 0 and at most beta_fast=32.0.",
        ),
        (
            "attention.yarn.beta_slow=0",
            "beta_slow=0.0 must be above 0 and at most beta_fast=32.0.",
        ),
        ("moe.expert_mlp_dim=0", "expert_mlp_dim=0 must be at least 1."),
        ("moe.num_shared_experts=-1", "num_shared_experts=-1 must be at least 0."),
        (
            "moe.backend=dense",
            "backend='dense' is not one of 'auto', 'blocks', 'ragged'.",
        ),
        ("moe.remat=block", "remat='block' is not one of 'none', 'activations'."),
        (
            "moe.exchange.backend=nccl",
            "backend='nccl' is not one of 'padded', 'ragged', 'gather', 'balanced'.",
        ),
        (
            "moe.exchange.drop_order=random",
            "drop_order='random' is not one of 'score', 'position'.",
        ),
        (
            "moe.exchange.dispatch_dtype=int8",
            "dispatch_dtype='int8' is not one of 'activations', 'float8_e4m3fn'.",
        ),
        ("moe.exchange.chunks=0", "chunks=0 must be at least 1."),
        (
            "moe.exchange.capacity_factor=0.99",
            "capacity_factor=0.99 must be at least 1 and finite, or none: below 1, "
            "tokens that use all experts alike wouldn't find room.",
        ),
        (
            "moe.exchange.capacity_factor=inf",
            "capacity_factor=inf must be at least 1 and finite, or none: below 1, "
            "tokens that use all experts alike wouldn't find room.",
        ),
        ("moe.router.num_experts=0", "num_experts=0 must be at least 1."),
        (
            "moe.router.num_experts=30",
            "num_experts=30 must divide into num_groups=4 equal groups.",
        ),
        (
            "moe.router.num_experts=4",
            "top_k=4 exceeds the 2 experts reachable through groups_per_token=2.",
        ),
        ("moe.router.top_k=0", "top_k=0 must be at least 1."),
        (
            "moe.router.top_k=17",
            "top_k=17 exceeds the 16 experts reachable through groups_per_token=2.",
        ),
        ("moe.router.num_groups=0", "num_groups=0 must be at least 1."),
        (
            "moe.router.num_groups=32",
            "top_k=4 exceeds the 2 experts reachable through groups_per_token=2.",
        ),
        ("moe.router.groups_per_token=0", "groups_per_token=0 must be at least 1."),
        (
            "moe.router.groups_per_token=5",
            "groups_per_token=5 exceeds num_groups=4.",
        ),
        (
            "moe.router.score=relu",
            "score='relu' is not one of 'sigmoid', 'softmax', 'sqrt_softplus'.",
        ),
        (
            "moe.router.group_score=sum",
            "group_score='sum' is not one of 'top2_sum', 'max'.",
        ),
        ("moe.router.gate_scale=-1", "gate_scale=-1.0 must be at least 0.0."),
        (
            "moe.router.update_rule=adam",
            "update_rule='adam' is not one of 'sign', 'sign_centered', "
            "'proportional', 'quantile'.",
        ),
        (
            "moe.router.auxiliary_loss=gshard",
            "auxiliary_loss='gshard' is not one of 'none', 'switch', 'sequence', "
            "'global_batch'.",
        ),
        (
            "moe.router.auxiliary_weight=-0.1",
            "auxiliary_weight=-0.1 must be at least 0.0.",
        ),
    ],
)
def test_an_impossible_shape_is_refused_by_name(assignment, said):
    with pytest.raises(ValueError) as error:
        records.override(ModelConfig.preset("tiny"), [YARN, assignment])
    assert str(error.value) == said


GQA = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "rope_dim": 8}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "mla"}, "kind='mla' is not one of 'gqa'."),
        (
            {"num_kv_heads": 3},
            "num_heads=8 must be a multiple of num_kv_heads=3, which equally many of "
            "them share.",
        ),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be at least 1."),
        ({"rope_dim": 18}, "rope_dim=18 must be at most head_dim=16."),
        ({"rope_dim": 7}, "rope_dim=7 must be even, to rotate pairs."),
        (
            {"rope_pairs": "neighbours"},
            "rope_pairs='neighbours' is not one of 'interleaved', 'halves'.",
        ),
        ({"qk_norm_eps": -1.0}, "qk_norm_eps=-1.0 must be at least 0.0."),
    ],
)
def test_impossible_grouped_queries_are_refused_by_name(changes, said):
    with pytest.raises(ValueError) as error:
        GQAConfig(**GQA | changes)
    assert str(error.value) == said


def test_a_model_is_stacks_of_like_layers_in_their_order():
    tiny = ModelConfig.preset("tiny")
    stacks = tiny.stacks
    assert [list(stack.layers) for stack in stacks.values()] == [[0], [1, 2, 3]]
    assert stacks["dense"].feed_forward == DenseConfig(mlp_dim=tiny.dense_mlp_dim)
    assert stacks["moe"].feed_forward == tiny.moe
    without_dense = dataclasses.replace(tiny, num_dense_layers=0)
    assert list(without_dense.stacks) == ["moe"]


def test_an_exchange_that_never_drops_takes_no_capacity_factor():
    with pytest.raises(ValueError, match="capacity_factor=1.5 must be none with back"):
        ExchangeConfig(backend="gather", capacity_factor=1.5)


def test_groups_of_one_expert_have_no_top_two():
    with pytest.raises(ValueError, match="'top2_sum' needs at least 2 experts a group"):
        RouterConfig(num_experts=8, top_k=2, num_groups=8, groups_per_token=4)
    assert (
        RouterConfig(
            num_experts=8,
            top_k=2,
            num_groups=8,
            groups_per_token=4,
            group_score="max",
        ).group_size
        == 1
    )


def test_a_single_group_of_one_expert_is_a_shape():
    assert RouterConfig(num_experts=1, top_k=1).group_size == 1


def test_top_k_may_use_up_all_the_groups_it_reaches():
    router = RouterConfig(num_experts=32, top_k=16, num_groups=4, groups_per_token=2)
    assert router.top_k == router.groups_per_token * router.group_size


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig.preset("tiny").num_layers = 5


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        ModelConfig.preset("huge")
    assert str(error.value) == (
        "Unknown model preset 'huge'; known: tiny, bench_s, small, v2_lite, "
        "moonlight, v3, kimi_k2, glm4_air, dots1, "
        "qwen3_30b."
    )


def test_plain_attention_scales_by_the_root_of_its_query_width():
    assert attention().qk_dim == 48
    assert attention().softmax_scale == pytest.approx(1 / math.sqrt(48))
    assert GQAConfig(**GQA).softmax_scale == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    "factor, all_dims, temperature",
    [
        (40.0, 1.0, 0.1 * math.log(40) + 1),
        (40.0, 0.707, 0.0707 * math.log(40) + 1),
        (40.0, None, 1.0),
        (40.0, 0.0, 1.0),
        (1.0, 1.0, 1.0),
    ],
)
def test_yarn_sharpens_attention_by_its_squared_temperature(
    factor, all_dims, temperature
):
    yarn = YarnConfig(factor=factor, original_positions=256, mscale_all_dim=all_dims)
    plain, scaled = attention(), attention(yarn=yarn)
    ratio = scaled.softmax_scale / plain.softmax_scale
    assert ratio == pytest.approx(temperature**2)


@pytest.mark.parametrize(
    ("name", "backend", "remat"),
    [
        ("blocks_remat", "blocks", "activations"),
        ("blocks_apart", "blocks", "none"),
        ("blocks_remat_apart", "blocks", "activations"),
        ("ragged_apart", "ragged", "none"),
    ],
)
def test_a_backend_of_jmoe_0_1_is_read_as_what_it_was(name, backend, remat):
    values = records.to_dict(ModelConfig.preset("tiny").moe) | {"backend": name}
    del values["remat"]  # which 0.1 hasn't written
    got = records.from_dict(MoEConfig, values)
    assert (got.backend, got.remat) == (backend, remat)
