"""The presets have the sizes that their names and papers promise."""

import pytest

from jmoe.config.model import ModelConfig
from jmoe.config.presets import RUNS


def attention_parameters(a, width):
    return {"mla": latent_parameters, "gqa": grouped_parameters}[a.kind](a, width)


def grouped_parameters(a, width):
    """GQA's projections, with the biases and the norms of heads that it may have."""
    heads = a.num_heads + 2 * a.num_kv_heads
    norms = 0 if a.qk_norm_eps is None else 2 * a.head_dim
    out = a.num_heads * a.head_dim * width
    return heads * a.head_dim * (width + a.qkv_bias) + norms + out


def latent_parameters(a, width):
    """MLA's projections and the norms of its latents (arXiv 2405.04434, appendix C)."""
    query_width = a.num_heads * (a.nope_dim + a.rope_dim)
    query = width * query_width
    if a.query_latent_dim is not None:
        query = (width + 1 + query_width) * a.query_latent_dim
    down = width * (a.kv_latent_dim + a.rope_dim) + a.kv_latent_dim
    up = a.kv_latent_dim * a.num_heads * (a.nope_dim + a.value_dim)
    return query + down + up + a.num_heads * a.value_dim * width


def block_parameters(cfg, mlp_parameters):
    norms = 2 * cfg.hidden_dim
    return attention_parameters(cfg.attention, cfg.hidden_dim) + norms + mlp_parameters


def moe_block_parameters(cfg, num_routed):
    swiglu = 3 * cfg.hidden_dim * cfg.moe.expert_mlp_dim
    experts = (num_routed + cfg.moe.num_shared_experts) * swiglu
    router = cfg.moe.router.num_experts * cfg.hidden_dim
    return block_parameters(cfg, experts + router)


def model_parameters(cfg, num_routed):
    """All but the MTP modules and the input embedding, with `num_routed` experts."""
    dense = block_parameters(cfg, 3 * cfg.hidden_dim * cfg.dense_mlp_dim)
    moe = moe_block_parameters(cfg, num_routed)
    num_moe = cfg.num_layers - cfg.num_dense_layers
    head_and_norm = (cfg.vocab_size + 1) * cfg.hidden_dim
    return cfg.num_dense_layers * dense + num_moe * moe + head_and_norm


def total_parameters(cfg):
    embedding = cfg.vocab_size * cfg.hidden_dim
    return model_parameters(cfg, cfg.moe.router.num_experts) + embedding


def active_parameters(cfg):
    """Counts those a token is multiplied with: no embedding, top_k of the experts."""
    return model_parameters(cfg, cfg.moe.router.top_k)


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("tiny", 3.373e6, 1.046e6),
        ("bench_s", 193.5e6, 29.67e6),
        ("small", 1.235e9, 0.1983e9),
        ("v2_lite", 15.7e9, 2.45e9),  # arXiv 2405.04434, appendix B: 2.4
        ("moonlight", 15.96e9, 2.58e9),
        ("kimi_k2", 1026.4e9, 31.69e9),  # the report's 1.04T have an MTP module
        ("glm4_air", 106.85e9, 12.80e9),
        ("dots1", 142.8e9, 13.39e9),
        ("qwen3_30b", 30.53e9, 3.042e9),
        ("v3", 671.0e9, 36.6e9),  # README_WEIGHTS.md of DeepSeek-V3
    ],
)
def test_a_shape_has_the_parameters_it_is_known_for(name, total, active):
    cfg = ModelConfig.preset(name)
    assert not cfg.tie_embeddings
    assert total_parameters(cfg) == pytest.approx(total, rel=1e-3)
    assert active_parameters(cfg) == pytest.approx(active, rel=1e-3)


def test_v3s_checkpoint_holds_685_billion_parameters_with_its_mtp_module():
    cfg = ModelConfig.preset("v3")
    width, embedding = cfg.hidden_dim, cfg.vocab_size * cfg.hidden_dim
    block = moe_block_parameters(cfg, cfg.moe.router.num_experts)
    assert block == pytest.approx(11.5e9, rel=1e-3)  # README_WEIGHTS.md
    module = block + 2 * width * width + 3 * width  # eh_proj; enorm, hnorm, norm
    stored = total_parameters(cfg) + cfg.mtp_depth * (module + 2 * embedding)
    assert stored == pytest.approx(685e9, rel=1e-3)


def test_v3_is_the_shape_of_the_paper():
    cfg = ModelConfig.preset("v3")
    router, attention = cfg.moe.router, cfg.attention
    assert (cfg.num_layers, cfg.num_dense_layers, cfg.hidden_dim) == (61, 3, 7168)
    assert (router.num_experts, router.top_k) == (256, 8)
    assert (router.num_groups, router.groups_per_token) == (8, 4)
    assert (router.auxiliary_loss, router.auxiliary_weight) == ("sequence", 1e-4)
    assert (attention.num_heads, attention.query_latent_dim) == (128, 1536)
    assert (attention.kv_latent_dim, attention.rope_dim) == (512, 64)
    assert (attention.nope_dim, attention.value_dim) == (128, 128)
    assert attention.yarn is not None
    assert (
        cfg.max_positions == attention.yarn.factor * attention.yarn.original_positions
    )
    assert (cfg.init_std, cfg.mtp_depth, cfg.vocab_size) == (0.006, 1, 129_280)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_by_its_presets_name(name):
    run = RUNS[name]()
    assert run.name == name
    assert run.model == ModelConfig.preset(name)


def test_the_small_run_sees_20_tokens_for_each_active_parameter():
    run = RUNS["small"]()
    tokens = run.train.steps * run.train.batch_size * run.data.sequence_length
    assert tokens == pytest.approx(3.9e9, rel=0.01)
    assert tokens / active_parameters(run.model) == pytest.approx(20, rel=0.02)
