"""One model and its loss on both sides, jmoe's and transformers', number by number."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import families
from jmoe.checkpoint import manifest
from jmoe.export import names
from jmoe.nn.block import Block
from jmoe.nn.model import Transformer, abstract_variables
from jmoe.nn.router import Router
from jmoe.parallel.vocabulary import linear_cross_entropy


class Measured(NamedTuple):
    """What both sides are asked for; gradients under Hugging Face's names."""

    logits: Any
    loss: Any
    gradients: dict[str, Any]
    hidden: list[Any]  # of each layer
    routing: list[tuple[Any, Any]]  # of each MoE layer, experts and gates [N, K]
    mtp: tuple[Any, ...] = ()  # of each MTP module, its output; jmoe's alone


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
        x = x.reshape(tensor.shape)
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
    """The mean loss; with it logits, MTP's output, what blocks and routers returned."""
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
    logits = features.hidden_BSD @ features.head_DV
    return loss, (logits, features.mtp_BSD, captured)


def run_jmoe(cfg, variables, tokens_BT):
    found, gradients = loss_and_more(cfg, variables, tokens_BT)
    loss, (logits, mtp, captured) = found
    gradients = hf_tensors({"params": gradients["params"]}, cfg)
    if cfg.layer_loop == "scan":  # which captures nothing inside
        return Measured(logits, loss, gradients, [], [], mtp)
    layers = captured["intermediates"]
    dense = [layers[f"dense_{i}"] for i in range(cfg.num_dense_layers)]
    moe = [layers[f"moe_{i}"] for i in range(cfg.num_moe_layers)]
    hidden = [layer["__call__"][0][0] for layer in dense + moe]
    routing = [layer["moe"]["router"]["__call__"][0][0] for layer in moe]
    return Measured(logits, loss, gradients, hidden, routing, mtp)


def architecture(cfg):
    """The class of transformers that has the models of the family."""
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers"
    )
    return getattr(transformers, families.lookup(cfg.family).architecture)


def transformers_model(cfg, hf):
    """Its model of the config.json `hf`; it goes by its own name of the family."""
    config_class = architecture(cfg).config_class
    return architecture(cfg)(
        config_class(**hf | {"model_type": config_class.model_type})
    )


def run_transformers(cfg, state, tokens_BT):
    torch = pytest.importorskip("torch", reason="compares with torch")
    hf = families.to_hf(cfg)
    if "n_shared_experts" in hf:  # without, there is no such model: one of zeros
        hf["n_shared_experts"] = max(cfg.moe.num_shared_experts, 1)
    model = transformers_model(cfg, hf)
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


def by_expert(routing):
    """Each token's experts and gates in the experts' order; theirs is free."""
    expert_NK, gate_NK = map(np.asarray, routing)
    order_NK = expert_NK.argsort(-1)
    return [np.take_along_axis(x, order_NK, -1) for x in (expert_NK, gate_NK)]


def random_variables(cfg, seed=0):
    """Variables of order 1 everywhere, so that every one of them shows in the output.

    Kernels keep the scale of what they multiply, norms are near 1, biases are not 0.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape)
        name = path[-1].key
        if name == "scale":
            noise = 1 + 0.2 * noise
        elif name == "bias":
            noise = 0.1 * noise
        elif name != "embedding":
            noise *= 0.2
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_variables(cfg))


def exportable_variables(cfg):
    """The same, but zero where the family's files have nothing."""
    variables = random_variables(cfg)
    for path in names.absent(cfg):
        *parents, last = path.split("/")
        node = variables
        for parent in parents:
            node = node[parent]
        node[last] *= 0
    return variables


def relative_error(got, want):
    """The largest error, relative to the largest entry.

    Entries that come out small do so by cancellation, and carry the rounding of the
    large terms they are made of.
    """
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()
