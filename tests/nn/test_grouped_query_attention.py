"""Grouped-query attention against transformers' modules and against float64.

Shapes: B batch, T position, D hidden, H head, K head of keys and values, Q head
dimension.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import GQAConfig, YarnConfig
from jmoe.nn import mixers
from jmoe.nn.grouped_query_attention import GroupedQueryAttention
from jmoe.nn.measured import NOTHING

B, T, D, H, K, Q = 2, 13, 24, 6, 2, 8
THETA, EPSILON = 500.0, 0.01
SIZES = {"num_heads": H, "num_kv_heads": K, "head_dim": Q, "rope_theta": THETA}
YARN = {"factor": 4.0, "original_positions": 16, "mscale": None, "mscale_all_dim": None}

CASES = {  # family, our record, what theirs says besides
    "glm4_moe": (
        "Glm4Moe",
        GQAConfig(**SIZES, rope_dim=Q // 2, qkv_bias=True, qk_norm_eps=EPSILON),
        {"attention_bias": True, "use_qk_norm": True},
    ),
    "glm4_air": (
        "Glm4Moe",
        GQAConfig(**SIZES, rope_dim=Q // 2, qkv_bias=True, block_size=5),
        {"attention_bias": True, "use_qk_norm": False},
    ),
    "dots1": ("Dots1", GQAConfig(**SIZES, rope_dim=Q, qk_norm_eps=EPSILON), {}),
    "qwen3_moe": (
        "Qwen3Moe",
        GQAConfig(**SIZES, rope_dim=Q, qk_norm_eps=EPSILON, yarn=YarnConfig(**YARN)),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}
NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}


def random_params(cfg):
    """Large enough for every one of them to show."""
    module = GroupedQueryAttention(cfg, 0.02)
    x_BTD = jnp.zeros((B, T, D))
    rotation = mixers.rotation(cfg, T)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_BTD, rotation, None)
    rng = np.random.default_rng(0)

    def draw(box):
        return np.float32(1 + 0.3 * rng.normal(size=box.value.shape))

    boxes = shapes["params"]
    return jax.tree.map(draw, boxes, is_leaf=lambda x: hasattr(x, "value"))


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(cfg, params, x_BTD, d_out_BTD, segment_BT=None):
    def attend(params, x_BTD):
        module = GroupedQueryAttention(cfg, 0.02)
        rotation = mixers.rotation(cfg, T)
        out_BTD, measured = module.apply(
            {"params": params}, x_BTD, rotation, segment_BT
        )
        assert measured == NOTHING
        return out_BTD

    out_BTD, pull = jax.vjp(attend, params, x_BTD)
    return out_BTD, *pull(d_out_BTD)


def as_theirs(params):
    """Our parameters, or their gradients, under their names."""
    tensors = {}
    for ours, theirs in NAMES.items():
        kernel = params[ours]["kernel"]
        tensors[f"{theirs}.weight"] = kernel.reshape(kernel.shape[0], -1).T
        if "bias" in params[ours]:
            tensors[f"{theirs}.bias"] = params[ours]["bias"].reshape(-1)
    for ours, theirs in NORMS.items():
        if ours in params:
            tensors[f"{theirs}.weight"] = params[ours]["scale"]
    return {name: np.array(x) for name, x in tensors.items()}


def run_transformers(family, cfg, settings, state, x_BTD, d_out_BTD):
    torch = pytest.importorskip("torch", reason="compares with torch")
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers"
    )
    name = {"Glm4Moe": "glm4_moe", "Dots1": "dots1", "Qwen3Moe": "qwen3_moe"}[family]
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    rope_keys = ("rope_type", "factor", "original_max_position_embeddings")
    rope = {key: settings[key] for key in rope_keys if key in settings}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=Q,
        rms_norm_eps=EPSILON,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": THETA,
            "partial_rotary_factor": cfg.rope_dim / Q,
            **rope,
        },
        **{key: value for key, value in settings.items() if key not in rope},
    )
    config._attn_implementation = "eager"
    module = getattr(modeling, f"{family}Attention")(config, layer_idx=0)
    module.load_state_dict({k: torch.from_numpy(x) for k, x in state.items()})
    x_BTD = torch.from_numpy(x_BTD).requires_grad_()
    rotary = getattr(modeling, f"{family}RotaryEmbedding")(config)
    positions = rotary(x_BTD, torch.arange(T)[None])
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    out_BTD, _ = module(x_BTD, positions, mask)
    out_BTD.backward(torch.from_numpy(d_out_BTD))
    gradients = {name: x.grad.numpy() for name, x in module.named_parameters()}
    return out_BTD.detach().numpy(), gradients, x_BTD.grad.numpy()


@pytest.mark.parametrize("case", CASES)
def test_output_and_all_gradients_equal_transformers(case, relative_error):
    family, cfg, settings = CASES[case]
    params = random_params(cfg)
    x_BTD, d_out_BTD = np.random.default_rng(1).normal(size=(2, B, T, D)).astype("f4")
    out, d_params, d_x = output_and_gradients(cfg, params, x_BTD, d_out_BTD)
    want_out, want_gradients, want_d_x = run_transformers(
        family, cfg, settings, as_theirs(params), x_BTD, d_out_BTD
    )
    assert relative_error(out, want_out) < 1e-5
    assert relative_error(d_x, want_d_x) < 1e-5
    gradients = as_theirs(d_params)
    assert gradients.keys() == want_gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, want_gradients[name]) < 1e-5, name


def naive(cfg, params, x_BTD, segment_BT):
    """Head by head in float64, pairs as complex numbers."""
    params = jax.tree.map(np.float64, params)
    out_BTD = np.zeros((B, T, D))
    frequency_P = THETA ** -(np.arange(0, cfg.rope_dim, 2) / cfg.rope_dim)
    turn_TP = np.exp(1j * np.arange(T)[:, None] * frequency_P)
    seen_BTT = np.tril(segment_BT[:, :, None] == segment_BT[:, None])

    def project(name, head, norm=None):
        linear = params[name]
        y_BTQ = x_BTD @ linear["kernel"][:, head] + linear["bias"][head]
        if norm is None:
            return y_BTQ
        y_BTQ /= np.sqrt(np.square(y_BTQ).mean(-1, keepdims=True) + EPSILON)
        y_BTQ *= params[norm]["scale"]
        pairs = y_BTQ[..., : cfg.rope_dim : 2] + 1j * y_BTQ[..., 1 : cfg.rope_dim : 2]
        turned = pairs * turn_TP
        parts = [turned.real, turned.imag, y_BTQ[..., cfg.rope_dim :]]
        return np.concatenate(parts, -1)

    for head in range(H):
        shared = head // (H // K)
        q_BTQ = project("query", head, "query_norm")
        k_BTQ, v_BTQ = project("key", shared, "key_norm"), project("value", shared)
        weight_BTT = np.exp(q_BTQ @ k_BTQ.swapaxes(1, 2) / np.sqrt(Q)) * seen_BTT
        weight_BTT /= weight_BTT.sum(-1, keepdims=True)
        rows = slice(head * Q, (head + 1) * Q)
        out_BTD += weight_BTT @ v_BTQ @ params["out"]["kernel"][rows]
    return out_BTD


def test_interleaved_pairs_and_documents_equal_float64(relative_error):
    cfg = GQAConfig(
        **SIZES,
        rope_dim=6,
        rope_pairs="interleaved",
        qkv_bias=True,
        qk_norm_eps=EPSILON,
        block_size=4,
    )
    params = random_params(cfg)
    x_BTD = np.random.default_rng(1).normal(size=(B, T, D)).astype("f4")
    segment_BT = np.repeat([[0, 1], [3, 2]], [5, T - 5], axis=1).astype(np.int32)
    got, *_ = output_and_gradients(cfg, params, x_BTD, x_BTD, segment_BT)
    assert relative_error(got, naive(cfg, params, x_BTD, segment_BT)) < 1e-5
