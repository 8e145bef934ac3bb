"""Named shapes and runs. A preset is a function, so that nothing is built on import.

Sizes are numbers of parameters.
"""

from jmoe.config.attention import GQAConfig, MLAConfig, YarnConfig
from jmoe.config.data import DataConfig
from jmoe.config.model import ModelConfig, MoEConfig, RouterConfig
from jmoe.config.run import OptimizerConfig, RunConfig, ScheduleConfig
from jmoe.config.train import StepwiseConfig, TrainConfig


def tiny_model() -> ModelConfig:
    """Returns every part of V3, to train in about 3 minutes on 2 CPU cores."""
    return ModelConfig(
        vocab_size=2048,
        hidden_dim=128,
        num_layers=4,
        num_dense_layers=1,
        dense_mlp_dim=384,
        max_positions=1024,
        mtp_depth=1,
        init_std=0.02,
        attention=MLAConfig(
            num_heads=4,
            query_latent_dim=64,
            kv_latent_dim=64,
            nope_dim=32,
            rope_dim=16,
            value_dim=32,
        ),
        moe=MoEConfig(
            expert_mlp_dim=64,
            router=RouterConfig(
                num_experts=32,
                top_k=4,
                num_groups=4,
                groups_per_token=2,
                gate_scale=1.0,
            ),
        ),
    )


def bench_s_model() -> ModelConfig:
    """Returns the 193.5M-parameter shape that CPU benchmarks compare systems on."""
    return ModelConfig(
        vocab_size=8192,
        hidden_dim=512,
        num_layers=8,
        num_dense_layers=1,
        dense_mlp_dim=1408,
        init_std=0.02,
        layer_loop="unroll",
        attention=MLAConfig(
            num_heads=8,
            query_latent_dim=192,
            kv_latent_dim=128,
            nope_dim=32,
            rope_dim=32,
            value_dim=32,
        ),
        moe=MoEConfig(
            expert_mlp_dim=256,
            router=RouterConfig(
                num_experts=64, top_k=6, num_groups=8, groups_per_token=4
            ),
        ),
    )


def small_model() -> ModelConfig:
    """Returns a research model for one GPU: 1.2B parameters, 0.2B active."""
    return ModelConfig(
        vocab_size=32_768,
        hidden_dim=1024,
        num_layers=12,
        num_dense_layers=1,
        dense_mlp_dim=2816,
        mtp_depth=1,
        dtype="bfloat16",
        remat="block",
        attention=MLAConfig(
            num_heads=16,
            query_latent_dim=384,
            kv_latent_dim=256,
            nope_dim=64,
            rope_dim=32,
            value_dim=64,
        ),
        moe=MoEConfig(
            expert_mlp_dim=512,
            router=RouterConfig(
                num_experts=64,
                top_k=6,
                num_groups=8,
                groups_per_token=4,
                gate_scale=2.5,
            ),
        ),
    )


def v2_lite_model() -> ModelConfig:
    """Returns DeepSeek-V2-Lite: 16B, 2.4B active (arXiv 2405.04434, appendix B)."""
    return ModelConfig(
        vocab_size=102_400,
        hidden_dim=2048,
        num_layers=27,
        num_dense_layers=1,
        dense_mlp_dim=10_944,
        max_positions=163_840,
        dtype="bfloat16",
        remat="block",
        init_std=0.02,
        attention=MLAConfig(
            num_heads=16,
            query_latent_dim=None,
            kv_latent_dim=512,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            yarn=YarnConfig(
                factor=40.0,
                original_positions=4096,
                mscale=0.707,
                mscale_all_dim=0.707,
            ),
        ),
        moe=MoEConfig(
            expert_mlp_dim=1408,
            num_shared_experts=2,
            router=RouterConfig(
                num_experts=64,
                top_k=6,
                score="softmax",
                group_score="max",
                normalize_gates=False,
            ),
        ),
        family="deepseek_v2",
    )


def moonlight_model() -> ModelConfig:
    """Returns Moonlight: 16B, 3B active (arXiv 2502.16982, and its config.json)."""
    return ModelConfig(
        vocab_size=163_840,
        hidden_dim=2048,
        num_layers=27,
        num_dense_layers=1,
        dense_mlp_dim=11_264,
        max_positions=8192,
        norm_eps=1e-5,
        dtype="bfloat16",
        remat="block",
        init_std=0.02,
        attention=MLAConfig(
            num_heads=16,
            query_latent_dim=None,
            kv_latent_dim=512,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            rope_theta=50_000.0,
        ),
        moe=MoEConfig(
            expert_mlp_dim=1408,
            num_shared_experts=2,
            router=RouterConfig(num_experts=64, top_k=6, gate_scale=2.446),
        ),
    )


def v3_model() -> ModelConfig:
    """Returns DeepSeek-V3: 671B, 37B active (arXiv 2412.19437, section 4.2)."""
    return ModelConfig(
        vocab_size=129_280,
        hidden_dim=7168,
        num_layers=61,
        num_dense_layers=3,
        dense_mlp_dim=18_432,
        max_positions=163_840,
        mtp_depth=1,
        dtype="bfloat16",
        remat="block",
        attention=MLAConfig(
            num_heads=128,
            query_latent_dim=1536,
            kv_latent_dim=512,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            yarn=YarnConfig(factor=40.0, original_positions=4096),
        ),
        moe=MoEConfig(
            expert_mlp_dim=2048,
            router=RouterConfig(
                num_experts=256,
                top_k=8,
                num_groups=8,
                groups_per_token=4,
                gate_scale=2.5,
                auxiliary_loss="sequence",
                auxiliary_weight=1e-4,
            ),
        ),
    )


def kimi_k2_model() -> ModelConfig:
    """Returns Kimi K2: 1T, 32B active (arXiv 2507.20534, and its config.json)."""
    return ModelConfig(
        vocab_size=163_840,
        hidden_dim=7168,
        num_layers=61,
        num_dense_layers=1,
        dense_mlp_dim=18_432,
        max_positions=131_072,
        dtype="bfloat16",
        remat="block",
        init_std=0.02,
        attention=MLAConfig(
            num_heads=64,
            query_latent_dim=1536,
            kv_latent_dim=512,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            rope_theta=50_000.0,
            yarn=YarnConfig(factor=32.0, original_positions=4096, beta_fast=1.0),
        ),
        moe=MoEConfig(
            expert_mlp_dim=2048,
            router=RouterConfig(num_experts=384, top_k=8, gate_scale=2.827),
        ),
        family="kimi_k2",
    )


def glm4_air_model() -> ModelConfig:
    """Returns GLM-4.5-Air: 106B, 12B active (arXiv 2508.06471, its config.json)."""
    return ModelConfig(
        vocab_size=151_552,
        hidden_dim=4096,
        num_layers=46,
        num_dense_layers=1,
        dense_mlp_dim=10_944,
        max_positions=131_072,
        mtp_depth=1,
        norm_eps=1e-5,
        dtype="bfloat16",
        remat="block",
        init_std=0.02,
        attention=GQAConfig(
            num_heads=96,
            num_kv_heads=8,
            head_dim=128,
            rope_dim=64,
            rope_theta=1_000_000.0,
            qkv_bias=True,
        ),
        moe=MoEConfig(
            expert_mlp_dim=1408, router=RouterConfig(num_experts=128, top_k=8)
        ),
        family="glm4_moe",
    )


def dots1_model() -> ModelConfig:
    """Returns dots.llm1: 143B, 14B active (arXiv 2506.05767, its config.json)."""
    return ModelConfig(
        vocab_size=152_064,
        hidden_dim=4096,
        num_layers=62,
        num_dense_layers=1,
        dense_mlp_dim=10_944,
        max_positions=32_768,
        norm_eps=1e-5,
        dtype="bfloat16",
        remat="block",
        init_std=0.02,
        attention=GQAConfig(
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rope_dim=128,
            rope_theta=10_000_000.0,
            qk_norm_eps=1e-5,
        ),
        moe=MoEConfig(
            expert_mlp_dim=1408,
            num_shared_experts=2,
            router=RouterConfig(num_experts=128, top_k=6, gate_scale=2.5),
        ),
        family="dots1",
    )


def qwen3_30b_model() -> ModelConfig:
    """Returns Qwen3-30B-A3B: 31B, 3B active (arXiv 2505.09388, its config.json)."""
    return ModelConfig(
        vocab_size=151_936,
        hidden_dim=2048,
        num_layers=48,
        num_dense_layers=0,
        dense_mlp_dim=6144,  # of no layer
        max_positions=40_960,
        dtype="bfloat16",
        remat="block",
        init_std=0.02,
        attention=GQAConfig(
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            rope_dim=128,
            rope_theta=1_000_000.0,
            qk_norm_eps=1e-6,
        ),
        moe=MoEConfig(
            expert_mlp_dim=768,
            num_shared_experts=0,
            router=RouterConfig(num_experts=128, top_k=8, score="softmax"),
        ),
        family="qwen3_moe",
    )


MODELS = {
    "tiny": tiny_model,
    "bench_s": bench_s_model,
    "small": small_model,
    "v2_lite": v2_lite_model,
    "moonlight": moonlight_model,
    "v3": v3_model,
    "kimi_k2": kimi_k2_model,
    "glm4_air": glm4_air_model,
    "dots1": dots1_model,
    "qwen3_30b": qwen3_30b_model,
}


def tiny_run() -> RunConfig:
    """Returns what `python scripts/train.py` trains: 3 minutes on 2 CPU cores.

    V3's schedule at its shortest. The bias moves fast while the router learns, and
    slowly once the learning rate is low, so that it settles.
    """
    return RunConfig(
        name="tiny",
        model=tiny_model(),
        data=DataConfig(sequence_length=128),
        train=TrainConfig(
            steps=420,
            batch_size=16,
            microbatch_size=16,
            bias_rate=StepwiseConfig(first=5e-3, last=5e-4, switch=0.7),
            eval_every=140,
            eval_batches=128,  # global MaxVio needs many tokens
            checkpoint_every=140,
        ),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(
                name="multi_step",
                peak=2e-3,
                warmup_steps=30,
                boundaries=(0.35, 0.8, 0.95),
                end_fraction=0.02,
                tail_fraction=0.01,
            )
        ),
    )


def small_run() -> RunConfig:
    """Returns a run for one GPU, of 3.9B tokens.

    That is about 20 for each active parameter (arXiv 2203.15556).
    """
    return RunConfig(
        name="small",
        model=small_model(),
        data=DataConfig(sequence_length=2048),
        train=TrainConfig(steps=30_000, batch_size=64, microbatch_size=16),
        optimizer=OptimizerConfig(
            moment_dtype="bfloat16",
            schedule=ScheduleConfig(peak=6e-4, warmup_steps=500),
        ),
    )


RUNS = {"tiny": tiny_run, "small": small_run}
