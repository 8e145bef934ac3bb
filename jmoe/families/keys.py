"""What fields are called in the config.json of most families, by the field's path."""

DECODER = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "dense_mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "mtp_depth": "num_nextn_predict_layers",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "dtype": "torch_dtype",
}
MOE = {
    "moe.expert_mlp_dim": "moe_intermediate_size",
    "moe.num_shared_experts": "n_shared_experts",
    "moe.router.num_experts": "n_routed_experts",
    "moe.router.top_k": "num_experts_per_tok",
    "moe.router.num_groups": "n_group",
    "moe.router.groups_per_token": "topk_group",
    "moe.router.score": "scoring_func",
    "moe.router.normalize_gates": "norm_topk_prob",
    "moe.router.gate_scale": "routed_scaling_factor",
}

DEFAULTS = {
    "initializer_range": 0.02,
    "num_nextn_predict_layers": 0,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
# Options that jmoe's models don't have.
DROPOUT = {"attention_dropout": (0, None)}
ACCEPTED = DROPOUT | {"partial_rotary_factor": (1, None)}
NULLS = {  # there are none, and no groups
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
}


def without(keys: dict[str, str], *fields: str) -> dict[str, str]:
    """Returns `keys` but for those of `fields`, which a family's files can't say."""
    return {field: key for field, key in keys.items() if field not in fields}
