"""Multi-token prediction against the paper's equations, one token at a time.

The oracle is a second, float64 implementation of the whole model in plain NumPy: no
blocks, no sorting, every head and every token by itself. Its comments name the
equations of DeepSeek-V3 (arXiv 2412.19437) that a line writes down.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.nn.model import Transformer

T, DEPTH = 9, 2


def norm(x, module):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * module["scale"]


def mlp(x_D, gate_up_D2F, down_FD):
    gate_F, up_F = np.einsum("d,dxf->xf", x_D, gate_up_D2F)
    return (gate_F / (1 + np.exp(-gate_F)) * up_F) @ down_FD


def turn(x_TR, theta=10_000.0):
    """Rotary pairs as complex numbers, turned by position (eq. 3 and 8)."""
    frequency_P = theta ** -(np.arange(0, x_TR.shape[1], 2) / x_TR.shape[1])
    angle_TP = np.arange(len(x_TR))[:, None] * frequency_P
    return (x_TR[:, 0::2] + 1j * x_TR[:, 1::2]) * np.exp(1j * angle_TP)


def attend(x_TD, p, cfg):
    latent_TC = x_TD @ p["kv_down"]["kernel"]  # eq. 1 and 3
    k_rope_TP = turn(latent_TC[:, cfg.kv_latent_dim :])
    latent_TC = norm(latent_TC[:, : cfg.kv_latent_dim], p["kv_norm"])
    query_TC = norm(x_TD @ p["query_down"]["kernel"], p["query_norm"])  # eq. 6
    heads = []
    for h in range(cfg.num_heads):
        q_TQ = query_TC @ p["query_up"]["kernel"][:, h]  # eq. 7 and 8
        k_TN, v_TV = np.split(latent_TC @ p["kv_up"]["kernel"][:, h], [cfg.nope_dim], 1)
        q_rope_TP = turn(q_TQ[:, cfg.nope_dim :])
        logit_TT = q_TQ[:, : cfg.nope_dim] @ k_TN.T
        logit_TT += (q_rope_TP @ k_rope_TP.conj().T).real
        weight_TT = np.tril(np.exp(logit_TT / np.sqrt(cfg.qk_dim)))  # eq. 10
        heads.append(weight_TT / weight_TT.sum(1, keepdims=True) @ v_TV)
    return np.concatenate(heads, 1) @ p["out"]["kernel"]  # eq. 11


def route(u_D, p, bias_E, cfg):
    """Experts and gates of one token, from a single group (eq. 13 to 16)."""
    score_E = 1 / (1 + np.exp(-(u_D @ p["kernel"])))
    chosen = np.argsort(-(score_E + bias_E))[: cfg.top_k]
    return chosen, cfg.gate_scale * score_E[chosen] / score_E[chosen].sum()


def block(x_TD, p, bias_E, cfg):
    x_TD = x_TD + attend(norm(x_TD, p["attention_norm"]), p["attention"], cfg.attention)
    out_TD = x_TD.copy()
    experts, shared = p["moe"]["experts"], p["moe"]["shared"]
    for t, u_D in enumerate(norm(x_TD, p["mlp_norm"])):
        out_TD[t] += mlp(u_D, shared["gate_up"]["kernel"], shared["down"]["kernel"])
        chosen = route(u_D, p["moe"]["router"], bias_E, cfg.moe.router)
        for expert, gate in zip(*chosen, strict=True):  # eq. 12
            weights = experts["gate_up"][expert], experts["down"][expert]
            out_TD[t] += gate * mlp(u_D, *weights)
    return out_TD


def oracle(cfg, variables, tokens_T):
    """Logits of every depth, the main model's first; depth k has T - k rows."""
    p, state = variables["params"], variables["router_state"]
    bias_E = state["moe_0"]["moe"]["router"]["bias"]
    h_TD = block(p["embedding"][tokens_T], p["moe_0"], bias_E, cfg)
    h_TD = norm(h_TD, p["final_norm"])
    logits = [h_TD @ p["head"]]
    for k in range(1, DEPTH + 1):
        module = p[f"mtp_{k - 1}"]
        next_TD = norm(p["embedding"][tokens_T[k:]], module["embedding_norm"])
        h_TD = norm(h_TD[: len(next_TD)], module["hidden_norm"])
        h_TD = np.concatenate([next_TD, h_TD], 1) @ module["project"]["kernel"]  # 21
        bias_E = state[f"mtp_{k - 1}"]["block"]["moe"]["router"]["bias"]
        h_TD = block(h_TD, module["block"], bias_E, cfg)  # eq. 22
        logits.append(norm(h_TD, module["norm"]) @ p["head"])  # eq. 23
    return logits


def probe(logits, xp):
    """A scalar in which every logit of every depth has its own random weight."""
    rng = np.random.default_rng(2)
    return sum(xp.vdot(rng.normal(size=x.shape), x) for x in logits)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def jmoe_probe(cfg, variables, tokens_T):
    output = Transformer(cfg).apply(variables, tokens_T[None])
    # A depth's last positions lack the token that they would embed.
    logits = [output.logits[0]]
    logits += [x[0, :-k] for k, x in enumerate(output.mtp_logits, 1)]
    return probe(logits, jnp), logits


@pytest.fixture(scope="module")
def case(small_config, random_variables):
    """Shape, float64 variables, tokens, and jmoe's logits and gradients."""
    cfg = small_config(
        "layer_loop=unroll",
        "num_layers=1",
        "num_dense_layers=0",
        f"mtp_depth={DEPTH}",
        "moe.router.num_groups=1",
        "moe.router.groups_per_token=1",
        "moe.router.gate_scale=2.5",
    )
    variables = random_variables(cfg)
    tokens_T = np.random.default_rng(1).integers(0, cfg.vocab_size, T)
    (_, logits), gradients = jmoe_probe(cfg, variables, tokens_T)
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    return cfg, variables, tokens_T, logits, gradients["params"]


def test_logits_of_every_depth_equal_the_papers_equations(case):
    cfg, variables, tokens_T, logits, _ = case
    for got, want in zip(logits, oracle(cfg, variables, tokens_T), strict=True):
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("part", ["embedding", "head", "moe_0", "mtp_0", "mtp_1"])
def test_gradients_equal_the_papers_equations_along_a_random_direction(case, part):
    cfg, variables, tokens_T, _, gradients = case
    rng = np.random.default_rng(3)
    direction = jax.tree.map(
        lambda x: rng.normal(size=x.shape), variables["params"][part]
    )

    def moved(step):
        params = dict(variables["params"])
        params[part] = jax.tree.map(lambda x, d: x + step * d, params[part], direction)
        return probe(oracle(cfg, variables | {"params": params}, tokens_T), np)

    want = (moved(1e-6) - moved(-1e-6)) / 2e-6
    slopes = jax.tree.map(np.vdot, gradients[part], direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(slopes)), want, rtol=1e-4)


def test_modules_share_embedding_and_head_with_the_model(case):
    params = case[1]["params"]
    own = {"embedding_norm", "hidden_norm", "project", "block", "norm"}
    assert set(params) == {"embedding", "moe_0", "final_norm", "head", "mtp_0", "mtp_1"}
    assert set(params["mtp_0"]) == set(params["mtp_1"]) == own
