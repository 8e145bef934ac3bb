"""Kinds of routers: each against a plain loop, on one device and on meshes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import MeshConfig, MoEConfig, RouterConfig
from jmoe.config.model import ROUTERS as KINDS
from jmoe.nn import noise
from jmoe.nn.choices import ROUTERS, Picks, Scored
from jmoe.nn.moe import MoE
from jmoe.nn.tokens import Tokens
from jmoe.parallel.mesh import make_mesh

B, T, D, F, E, K = 8, 8, 16, 8, 8, 2
CFG = RouterConfig(num_experts=E, top_k=K)
MESHES = ["data=2,expert=4,tensor=2", "data=4,tensor=4", "expert=4,tensor=4"]
RNG = np.random.default_rng(0)
TOKENS = Tokens(
    id_BT=jnp.asarray(RNG.integers(0, 99, (B, T)), jnp.int32),
    choice_BTK=jnp.asarray(RNG.permuted(np.tile(np.arange(E), (B, T, 1)), axis=-1))[
        ..., :K
    ],
    noise=noise.of_step(0, 1, jnp.arange(B)),
)


def config(kind, **changes):
    changes |= {"noise_std": 0.5} if kind == "noisy" else {}
    return dataclasses.replace(CFG, kind=kind, **changes)


def scored(seed=0, tokens=TOKENS):
    rng = np.random.default_rng(seed)
    score_BSE = jnp.asarray(rng.random((B, T, E)), jnp.float32)
    return Scored(score_BSE, jnp.asarray(rng.normal(size=E), jnp.float32), tokens)


def choose(kind, given, **changes):
    routing, _ = ROUTERS[kind](given, config(kind, **changes))
    return np.asarray(routing.expert_NK).reshape(B, T, K)


def test_the_config_knows_the_same_kinds():
    assert tuple(ROUTERS) == tuple(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_config_says_of_a_kind_is_what_it_does(kind):
    settled = TOKENS._replace(noise=None)
    given, shorter = scored(tokens=settled), T // 2
    routing, _ = ROUTERS[kind](given, config(kind))
    assert isinstance(routing, Picks) == KINDS[kind].by_experts
    if KINDS[kind].by_experts:
        return
    plain = choose("token_choice", given)
    chosen = choose(kind, given)
    assert np.array_equal(chosen, plain) == KINDS[kind].as_token_choice
    unbiased = choose(kind, given._replace(bias_E=jnp.zeros(E)))
    assert np.array_equal(chosen, unbiased) != KINDS[kind].by_bias
    if not KINDS[kind].no_text:  # what follows doesn't matter
        begun = settled._replace(id_BT=settled.id_BT[:, :shorter], choice_BTK=None)
        given = Scored(given.score_BSE[:, :shorter], given.bias_E, begun)
        routing, _ = ROUTERS[kind](given, config(kind))
        got = np.asarray(routing.expert_NK).reshape(B, shorter, K)
        np.testing.assert_array_equal(got, chosen[:, :shorter])


BY_TOKENS = [kind for kind, said in KINDS.items() if not said.by_experts]


@pytest.mark.parametrize("kind", BY_TOKENS)
@pytest.mark.parametrize("hash_layers", [0, 1])
def test_a_tokens_choices_lie_in_as_few_groups_as_the_config_says(kind, hash_layers):
    changes = {"num_groups": 4, "hash_layers": hash_layers}
    cfg, chosen_BTK = config(kind, **changes), choose(kind, scored(), **changes)
    group_NK = chosen_BTK.reshape(-1, K) // cfg.group_size
    is_limited = max(len(set(group_K)) for group_K in group_NK.tolist()) == 1
    assert is_limited == KINDS[kind].within_groups
    assert cfg.most_groups == (1 if is_limited and not hash_layers else 4)


@pytest.mark.parametrize("kind", BY_TOKENS)
def test_gates_are_of_the_raw_scores_and_choices_are_distinct(kind):
    given = scored()
    routing, margin_EM = ROUTERS[kind](given, config(kind))
    assert margin_EM.shape == (E, 0)
    score_NE = np.asarray(given.score_NE)
    for n, chosen_K in enumerate(routing.expert_NK.tolist()):
        assert len(set(chosen_K)) == K and 0 <= min(chosen_K) <= max(chosen_K) < E
        want_K = score_NE[n, chosen_K] / score_NE[n, chosen_K].sum()
        np.testing.assert_allclose(routing.gate_NK[n], want_K, rtol=1e-6)


def test_noise_moves_some_choices_in_training_and_none_outside():
    plain = choose("token_choice", scored())
    assert 0.1 < (choose("noisy", scored()) != plain).mean() < 0.9
    quiet = scored(tokens=TOKENS._replace(noise=None))
    np.testing.assert_array_equal(choose("noisy", quiet), plain)


def test_a_hash_goes_by_the_tokens_id_alone_and_uses_all_experts():
    same = TOKENS._replace(id_BT=jnp.full((B, T), 7, jnp.int32))
    assert len(np.unique(choose("hash", scored(1, same)), axis=None)) == K
    np.testing.assert_array_equal(choose("hash", scored(1)), choose("hash", scored(2)))
    assert set(choose("hash", scored()).ravel().tolist()) == set(range(E))


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "visited"),
    # V3's, V2's, V2-Lite's and Qwen3's shape, and one choice in each of three groups.
    [(256, 8, 8, 4), (160, 6, 8, 3), (64, 6, 1, 1), (128, 8, 1, 1), (16, 3, 4, 3)],
)
def test_balanced_choices_load_experts_alike_and_visit_as_many_groups_as_they_may(
    experts, top_k, groups, visited
):
    shape = {"num_groups": groups, "groups_per_token": visited}
    cfg = RouterConfig(kind="balanced", num_experts=experts, top_k=top_k, **shape)
    score_BSE = jnp.ones((2, 4 * experts, experts))
    routing, _ = ROUTERS["balanced"](Scored(score_BSE, jnp.zeros(experts), TOKENS), cfg)
    expert_NK = np.asarray(routing.expert_NK)
    assert all(len({*row}) == top_k for row in expert_NK.tolist())
    count_E = np.bincount(expert_NK.ravel(), minlength=experts)
    assert count_E.tolist() == [2 * 4 * top_k] * experts
    parts, most = (groups, visited) if groups > 1 else (8, top_k)
    visits = [len({*row}) for row in (expert_NK // (experts // parts)).tolist()]
    assert set(visits) == {most}


def test_a_replay_takes_what_it_is_told_and_refuses_other_shapes():
    np.testing.assert_array_equal(choose("replayed", scored()), TOKENS.choice_BTK)
    for choice_BTK, said in (
        (None, "needs the experts to take"),
        (TOKENS.choice_BTK[:, 1:], r"have shape \(8, 7, 2\) for a layer; .* \(8, 8, 2"),
    ):
        with pytest.raises(ValueError, match=said):
            choose("replayed", scored(tokens=TOKENS._replace(choice_BTK=choice_BTK)))


@functools.cache
def moe(kind, **changes):
    cfg = MoEConfig(router=config(kind, **changes), expert_mlp_dim=F)
    layer = MoE(cfg, 0.5)
    x_BTD = jnp.asarray(np.random.default_rng(3).normal(size=(B, T, D)), jnp.float32)
    return layer, jax.jit(layer.init)(jax.random.key(0), x_BTD, TOKENS), x_BTD


def expert(w, e, x_XD):
    """One expert's SwiGLU, in float64."""
    gate_up, down = (np.asarray(w[name][e], np.float64) for name in ("gate_up", "down"))
    gate, up = (x_XD @ gate_up[:, half] for half in (0, 1))
    return (gate / (1 + np.exp(-gate)) * up) @ down


@pytest.mark.parametrize("padding", [0, 5])
def test_expert_choice_is_what_a_loop_over_experts_computes(padding):
    layer, variables, x_BTD = moe("expert_choice")
    layer = layer.clone(cfg=dataclasses.replace(layer.cfg, num_shared_experts=0))
    params = {k: x for k, x in _open(variables["params"]).items() if k != "shared"}
    is_real_BT = np.arange(T) < T - np.where(np.arange(B) == 1, padding, 0)[:, None]
    tokens = TOKENS._replace(is_real_BT=jnp.asarray(is_real_BT))
    state = _open(variables["router_state"])
    got, measured = layer.apply(
        {"params": params, "router_state": state}, x_BTD, tokens
    )
    want, load_E = np.zeros((B, T, D)), np.zeros(E, int)
    logit_BTE = np.asarray(x_BTD, np.float64) @ np.asarray(params["router"]["kernel"])
    score_BTE = 1 / (1 + np.exp(-logit_BTE))
    for b, e in np.ndindex(B, E):
        order = sorted(np.flatnonzero(is_real_BT[b]), key=lambda t: -score_BTE[b, t, e])
        taken = order[: T * K // E]
        load_E[e] += len(taken)
        y_XD = expert(params["experts"], e, np.asarray(x_BTD[b], np.float64)[taken])
        want[b, taken] += score_BTE[b, taken, e][:, None] * y_XD
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert measured.load.load_E.tolist() == load_E.tolist()
    assert measured.load.dropped_sending == measured.load.dropped_receiving == 0


def _open(tree):
    return jax.tree.map(
        lambda box: box.value, tree, is_leaf=lambda x: hasattr(x, "record")
    )


# Of one that chooses outside of groups, an exchange must not count on their limit.
GROUPS = {"hash": {"num_groups": 4}, "replayed": {"num_groups": 4}}


@functools.cache
def on_one_device(kind):
    """A layer's gradients with what else is compared: the function, and its results."""
    layer, variables, x_BTD = moe(kind, **GROUPS.get(kind, {}))
    params, state = _open(variables["params"]), _open(variables["router_state"])

    def loss(params, x_BSD, tokens):
        variables = {"params": params, "router_state": state}
        y_BSD, measured = layer.apply(variables, x_BSD, tokens)
        return (y_BSD**2).sum(), (y_BSD, measured.load.load_E)

    grad = jax.grad(loss, has_aux=True)
    return grad, jax.jit(grad)(params, x_BTD, TOKENS)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *itertools.product(["noisy", "expert_choice", "hash", "replayed"], MESHES),
        ("balanced", MESHES[0]),
    ],
)
def test_on_a_mesh_choices_outputs_and_gradients_are_one_devices(kind, mesh):
    _, variables, x_BTD = moe(kind, **GROUPS.get(kind, {}))
    params = _open(variables["params"])
    grad, (d_want, (want, load_E)) = on_one_device(kind)
    on = make_mesh(MeshConfig.parse(mesh))
    batch, rows = jax.P(("data", "expert")), jax.P(("data", "expert"), "tensor")
    specs = jax.tree.map(lambda _: batch, TOKENS)
    specs = specs._replace(noise=noise.Noise(jax.P(), batch), first_moe=jax.P())
    specs = specs._replace(moe_layer=jax.P())
    where = jax.tree.map(
        lambda box: jax.P(*(AXES.get(dim) for dim in box.names)),
        variables["params"],
        is_leaf=lambda x: hasattr(x, "record"),
    )

    def part(params, x_BSD, tokens):
        d_params, (y_BSD, load_E) = grad(params, x_BSD, tokens)
        total = jax.tree.map(
            lambda x, spec: jax.lax.psum(x, _copies(spec)), d_params, where
        )
        return total, y_BSD, jax.lax.psum(load_E, ("data", "expert", "tensor"))

    run = jax.shard_map(
        part,
        mesh=on,
        in_specs=(where, rows, specs),
        out_specs=(where, rows, jax.P()),
        check_vma=False,
    )
    d_got, got, counts = jax.jit(run)(params, x_BTD, TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == load_E.tolist()
    for name, x in jax.tree.leaves_with_path(d_want):
        other = d_got
        for key in name:
            other = other[key.key]
        np.testing.assert_allclose(other, x, rtol=0, atol=2e-5 * np.abs(x).max() + 1e-9)


AXES = {"expert": "expert", "mlp": "tensor", "heads": "tensor"}


def _copies(spec):
    return tuple(a for a in ("data", "expert", "tensor") if a not in tuple(spec))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (
            "noisy",
            {"noise_std": 0.0},
            "noise_std=0.0 must be above 0 with kind='noisy'",
        ),
        ("hash", {"noise_std": 0.1}, "and 0 with any other; it is 'hash'"),
        ("top", {}, "kind='top' is not one of 'token_choice', 'noisy'"),
        (
            "expert_choice",
            {"auxiliary_loss": "switch"},
            "auxiliary_loss='switch' must be 'none' with kind='expert_choice'",
        ),
        ("expert_choice", {"hash_layers": 1}, "hash_layers=1 must be 0"),
        (
            "balanced",
            {"num_experts": 16, "top_k": 7, "num_groups": 4, "groups_per_token": 2},
            "top_k=7 must divide evenly over groups of 4 experts, at most groups_per",
        ),
        (
            "balanced",
            {"update_rule": "quantile"},
            "update_rule='quantile' must be one of 'sign', 'sign_centered', "
            "'proportional' with kind='balanced'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(kind, changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CFG, kind=kind, **changes)
