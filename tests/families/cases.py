"""Of each family a tiny model; of each preset what its published config.json says.

A file here has the keys that describe the model, and one that jmoe doesn't read.
"""

import dataclasses

from jmoe.config import (
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    YarnConfig,
)
from jmoe.config.records import override

LATENT = ModelConfig(
    vocab_size=48,
    hidden_dim=32,
    num_layers=2,
    num_dense_layers=1,
    dense_mlp_dim=40,
    max_positions=640,
    mtp_depth=1,
    layer_loop="unroll",
    attention=MLAConfig(
        num_heads=2,
        query_latent_dim=12,
        kv_latent_dim=16,
        nope_dim=6,
        rope_dim=8,
        value_dim=10,
        yarn=YarnConfig(factor=40.0, original_positions=16),
    ),
    moe=MoEConfig(
        expert_mlp_dim=12,
        router=RouterConfig(
            num_experts=8, top_k=3, num_groups=4, groups_per_token=2, gate_scale=2.5
        ),
    ),
)
GROUPED = dataclasses.replace(
    LATENT,
    attention=GQAConfig(
        num_heads=4, num_kv_heads=2, head_dim=12, rope_dim=12, qk_norm_eps=1e-6
    ),
)
TINY = {
    "deepseek_v3": LATENT,
    "kimi_k2": override(LATENT, ["family=kimi_k2"]),
    "deepseek_v2": override(
        LATENT,
        [
            "family=deepseek_v2",
            "mtp_depth=0",
            "attention.query_latent_dim=none",
            "moe.num_shared_experts=2",
            "moe.router.score=softmax",
            "moe.router.group_score=max",
            "moe.router.normalize_gates=false",
        ],
    ),
    "glm4_moe": override(
        GROUPED,
        ["family=glm4_moe", "attention.rope_dim=6", "attention.qkv_bias=true"],
    ),
}

MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 163840,
}
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
V3 = MOONLIGHT | {
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "vocab_size": 129280,
}
KIMI_K2 = V3 | {
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
V2_LITE = MOONLIGHT | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "intermediate_size": 10944,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "vocab_size": 102400,
}
del V2_LITE["num_nextn_predict_layers"]
GLM4_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_qk_norm": False,
    "vocab_size": 151552,
}
PUBLISHED = {
    "v2_lite": V2_LITE,
    "moonlight": MOONLIGHT,
    "v3": V3,
    "kimi_k2": KIMI_K2,
    "glm4_air": GLM4_AIR,
}
