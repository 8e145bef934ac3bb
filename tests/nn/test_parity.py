"""The whole model against transformers' `DeepseekV3ForCausalLM`, number by number.

Both get the same random weights and selection biases.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.checkpoint import manifest
from jmoe.export import names
from jmoe.nn.block import Block
from jmoe.nn.model import Transformer
from jmoe.nn.router import Router
from jmoe.parallel.vocabulary import linear_cross_entropy

TOLERANCE = 1e-5
B, T = 2, 19
CASES = {
    "v3": (
        "layer_loop=unroll",
        "moe.router.gate_scale=2.5",
        "max_positions=640",
        "attention.yarn={'factor': 40.0, 'original_positions': 16}",
    ),
    "v2_lite": (
        "layer_loop=unroll",
        "num_layers=2",
        "attention.query_latent_dim=none",
        "attention.block_size=8",
        "moe.num_shared_experts=2",
        "moe.router.num_groups=1",
        "moe.router.groups_per_token=1",
        "moe.router.normalize_gates=false",
        "norm_eps=0.01",
    ),
    "unequal_mscales": (
        "layer_loop=unroll",
        "num_layers=2",
        "tie_embeddings=true",
        "moe.num_shared_experts=0",
        "moe.router.groups_per_token=1",
        "moe.router.top_k=2",
        "attention.rope_theta=500.0",
        "max_positions=512",
        "attention.yarn={'factor': 8.0, 'original_positions': 64, 'mscale': 1.0, "
        "'mscale_all_dim': 0.5}",
    ),
    "scan": (
        "layer_loop=scan",
        "num_layers=4",
        "num_dense_layers=2",
        "attention.block_size=8",
        "max_positions=512",
        "attention.yarn={'factor': 8.0, 'original_positions': 64, 'mscale': None, "
        "'mscale_all_dim': None}",
    ),
}


class Measured(NamedTuple):
    """What both sides are asked for; gradients under Hugging Face's names."""

    logits: Any
    loss: Any
    gradients: dict[str, Any]
    hidden: list[Any]  # of each layer
    routing: list[tuple[Any, Any]]  # of each MoE layer, experts and gates [N, K]


def hf_tensors(variables, cfg):
    """Variables, or some collections, as transformers has them: experts stacked."""
    leaves = {name: np.array(x) for name, x in manifest.flatten(variables).items()}
    tensors, parts = {}, {}
    for tensor in names.expand(cfg):
        if tensor.path not in leaves:
            continue
        x = leaves[tensor.path][tensor.index]
        if tensor.transposed:
            x = np.ascontiguousarray(x.reshape(len(x), -1).T)
        if tensor.expert is None:
            tensors[tensor.name] = x
            continue
        before, _, kind = tensor.name.rpartition(f".{tensor.expert}.")
        stack = "down_proj" if "down" in kind else "gate_up_proj"
        parts.setdefault(f"{before}.{stack}", []).append(x)
    for name, own in parts.items():
        stack = np.concatenate(own)
        tensors[name] = stack.reshape(cfg.moe.router.num_experts, -1, stack.shape[-1])
    return tensors


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def loss_and_more(cfg, variables, tokens_BT):
    """The mean loss; with it the logits and what blocks and routers returned."""
    features, captured = Transformer(cfg).apply(
        variables,
        tokens_BT,
        method="features",
        capture_intermediates=lambda module, _: isinstance(module, Block | Router),
        mutable=["intermediates"],
    )
    predicting_ND = features.hidden_BSD[:, :-1].reshape(-1, cfg.hidden_dim)
    target_N = tokens_BT[:, 1:].reshape(-1)
    weight_N = jnp.full(target_N.shape, 1 / target_N.size)
    loss = linear_cross_entropy(predicting_ND, features.head_DV, target_N, weight_N, 16)
    return loss, (features.hidden_BSD @ features.head_DV, captured)


def run_jmoe(cfg, variables, tokens_BT):
    (loss, (logits, captured)), gradients = loss_and_more(cfg, variables, tokens_BT)
    gradients = hf_tensors({"params": gradients["params"]}, cfg)
    if cfg.layer_loop == "scan":  # which captures nothing inside
        return Measured(logits, loss, gradients, [], [])
    layers = captured["intermediates"]
    dense = [layers[f"dense_{i}"] for i in range(cfg.num_dense_layers)]
    moe = [layers[f"moe_{i}"] for i in range(cfg.num_moe_layers)]
    hidden = [layer["__call__"][0][0] for layer in dense + moe]
    routing = [layer["moe"]["router"]["__call__"][0][0] for layer in moe]
    return Measured(logits, loss, gradients, hidden, routing)


def run_transformers(cfg, state, tokens_BT):
    torch = pytest.importorskip("torch", reason="compares with torch")
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers"
    )
    # Without shared experts there is no such model there: one of zeros stands in.
    shared = max(cfg.moe.num_shared_experts, 1)
    hf = transformers.DeepseekV3Config(**cfg.to_hf() | {"n_shared_experts": shared})
    model = transformers.DeepseekV3ForCausalLM(hf)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    zeros = {k: 0 * x for k, x in model.state_dict().items() if "shared_expert" in k}
    state = {name: torch.from_numpy(x) for name, x in state.items()}
    if cfg.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(zeros | state)

    hidden, routing = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: hidden.append(out))
    for layer in model.model.layers[cfg.num_dense_layers :]:
        layer.mlp.gate.register_forward_hook(
            lambda _, args, out: routing.append((out[2], out[1]))
        )
    tokens_BT = torch.from_numpy(tokens_BT)
    out = model(tokens_BT, labels=tokens_BT, use_cache=False)
    out.loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters()}
    measured = Measured(out.logits, out.loss, gradients, hidden, routing)
    return jax.tree.map(lambda x: x.detach().numpy(), measured)


@pytest.fixture(scope="module", params=CASES)
def measured(request, small_config, random_variables):
    """The same model on both sides: (jmoe's, transformers')."""
    cfg = small_config(*CASES[request.param])
    variables = random_variables(cfg)
    tokens_BT = np.random.default_rng(1).integers(0, cfg.vocab_size, (B, T))
    theirs = run_transformers(cfg, hf_tensors(variables, cfg), tokens_BT)
    return run_jmoe(cfg, variables, tokens_BT), theirs


UNROLLED = pytest.mark.parametrize("measured", set(CASES) - {"scan"}, indirect=True)


def test_logits_loss_and_all_gradients_are_equal(measured, relative_error):
    ours, theirs = measured
    assert relative_error(ours.logits, theirs.logits) < TOLERANCE
    assert relative_error(ours.loss, theirs.loss) < TOLERANCE
    for name, gradient in ours.gradients.items():
        assert relative_error(gradient, theirs.gradients[name]) < TOLERANCE, name


@UNROLLED
def test_hidden_states_of_every_layer_are_equal(measured, relative_error):
    ours, theirs = measured
    assert len(ours.hidden) == len(theirs.hidden)
    for got, want in zip(ours.hidden, theirs.hidden, strict=True):
        assert relative_error(got, want) < TOLERANCE


@UNROLLED
def test_every_router_chooses_the_same_experts_with_the_same_gates(
    measured, relative_error
):
    ours, theirs = measured
    for got, want in zip(ours.routing, theirs.routing, strict=True):
        # The order of a token's experts is free: sort both by expert.
        (got_NK, got_gate_NK), (want_NK, want_gate_NK) = map(by_expert, (got, want))
        np.testing.assert_array_equal(got_NK, want_NK)
        assert relative_error(got_gate_NK, want_gate_NK) < TOLERANCE


def by_expert(routing):
    expert_NK, gate_NK = map(np.asarray, routing)
    order_NK = expert_NK.argsort(-1)
    return [np.take_along_axis(x, order_NK, -1) for x in (expert_NK, gate_NK)]
