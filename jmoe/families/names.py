"""Names that the tensors of several families have, by our paths; see `family.Names`.

`model.layers.{num_layers + k}` is MTP module k, with our `project` as its `eh_proj`:
both concatenate the embedding's half before the hidden state's.
"""

from jmoe.families.family import Table

LATENT_ATTENTION: Table = {
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/query_down/kernel": "self_attn.q_a_proj.weight",
    "attention/query_norm/scale": "self_attn.q_a_layernorm.weight",
    "attention/query_up/kernel": "self_attn.q_b_proj.weight",
    "attention/kv_down/kernel": "self_attn.kv_a_proj_with_mqa.weight",
    "attention/kv_norm/scale": "self_attn.kv_a_layernorm.weight",
    "attention/kv_up/kernel": "self_attn.kv_b_proj.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
}
GROUPED_ATTENTION: Table = {
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/value/bias": "self_attn.v_proj.bias",
    "attention/out/kernel": "self_attn.o_proj.weight",
}
FEED_FORWARD: Table = {
    "mlp/gate_up/kernel": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp/down/kernel": "mlp.down_proj.weight",
    "moe/router/kernel": "mlp.gate.weight",
    "moe/router/bias": "mlp.gate.e_score_correction_bias",
    "moe/shared/gate_up/kernel": (
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ),
    "moe/shared/down/kernel": "mlp.shared_experts.down_proj.weight",
    "moe/experts/gate_up": (
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
    ),
    "moe/experts/down": "mlp.experts.{expert}.down_proj.weight",
}
MTP = {
    "embedding_norm/scale": "enorm.weight",
    "hidden_norm/scale": "hnorm.weight",
    "project/kernel": "eh_proj.weight",
    "norm/scale": "shared_head.norm.weight",
}
MODEL = {
    "embedding": ("model.embed_tokens.weight", "embed_tokens.weight"),
    "final_norm/scale": ("model.norm.weight", None),
    "head": ("lm_head.weight", "shared_head.head.weight"),
}


def block(attention: Table, feed_forward: Table = FEED_FORWARD) -> Table:
    """Returns the names in a pre-norm block, which is two norms and these two."""
    return {
        "attention_norm/scale": "input_layernorm.weight",
        **attention,
        "mlp_norm/scale": "post_attention_layernorm.weight",
        **feed_forward,
    }
