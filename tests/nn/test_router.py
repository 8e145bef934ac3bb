"""The router against a plain loop, and what must hold for every choice it makes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import bias, losses
from jmoe.config.model import GROUP_SCORES, RouterConfig
from jmoe.config.model import SCORES as SCORE_NAMES
from jmoe.nn import choices
from jmoe.nn.choices import GROUP_SCORE, route
from jmoe.nn.router import SCORES, Router
from jmoe.nn.tokens import Tokens
from jmoe.ops import rows

E, G, K, D = 12, 4, 3, 16
CFG = RouterConfig(num_experts=E, top_k=K, num_groups=G, groups_per_token=2)
Z_LOSS = dataclasses.replace(CFG, z_loss_weight=1.0)
SHARP = 3.0  # standard deviation of the logits: scores far apart
EXAMPLES = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**31 - 1)

jit_route = jax.jit(route, static_argnums=2)


@functools.partial(jax.jit, static_argnums=0)
def apply(cfg, variables, x_BTD):
    return Router(cfg, 1.0).apply(variables, x_BTD)


def variables(seed=0, cfg=CFG):
    rng = np.random.default_rng(seed)
    kernel_DE = SHARP / D**0.5 * rng.normal(size=(D, cfg.num_experts))
    bias_E = 0.3 * rng.normal(size=cfg.num_experts)
    return {
        "params": {"kernel": jnp.asarray(kernel_DE, jnp.float32)},
        "router_state": {"bias": jnp.asarray(bias_E, jnp.float32)},
    }


def tokens(seed=1, shape=(2, 10, D)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scores(seed, tokens=16):
    rng = np.random.default_rng(seed)
    score_NE = 1 / (1 + np.exp(-SHARP * rng.normal(size=(tokens, E))))
    return score_NE.astype(np.float32), 0.3 * rng.normal(size=E).astype(np.float32)


def oracle(logit_E, bias_E, cfg):
    """One token's {expert: gate} by the definitions of DeepSeek-V2 and V3."""
    score_E = np.exp(logit_E) / np.exp(logit_E).sum()
    if cfg.score == "sigmoid":
        score_E = 1 / (1 + np.exp(-logit_E))
    elif cfg.score == "sqrt_softplus":
        score_E = np.sqrt(np.log1p(np.exp(logit_E)))
    biased_E = score_E + bias_E
    groups = np.split(np.arange(cfg.num_experts), cfg.num_groups)
    best = {"top2_sum": 2, "max": 1}[cfg.group_score]
    groups.sort(key=lambda group: -np.sort(biased_E[group])[-best:].sum())
    reachable = np.concatenate(groups[: cfg.groups_per_token])
    chosen = sorted(reachable, key=lambda e: -biased_E[e])[: cfg.top_k]
    total = score_E[chosen].sum() if cfg.normalize_gates else 1.0
    return {e: cfg.gate_scale * score_E[e] / total for e in chosen}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("group_score", GROUP_SCORE)
@pytest.mark.parametrize("score", SCORES)
def test_choices_and_gates_follow_the_definitions(score, group_score, normalize):
    cfg = dataclasses.replace(
        CFG,
        score=score,
        group_score=group_score,
        normalize_gates=normalize,
        gate_scale=2.5,
    )
    state, x_BTD = variables(), tokens()
    (expert_NK, gate_NK), measured = apply(cfg, state, x_BTD)
    logit_NE = x_BTD.reshape(-1, D).astype(np.float64) @ state["params"]["kernel"]
    for n, logit_E in enumerate(np.asarray(logit_NE, np.float64)):
        want = oracle(logit_E, np.asarray(state["router_state"]["bias"]), cfg)
        got = dict(zip(expert_NK[n].tolist(), gate_NK[n].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-5)
    load_E = np.bincount(expert_NK.ravel(), minlength=E)
    np.testing.assert_array_equal(measured.load.load_E, load_E)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 32])
def test_a_groups_score_is_the_sum_of_its_best_two(size):
    # Of few values, so that the best are often equal.
    score_NGJ = np.random.default_rng(size).integers(-4, 0, (20, 3, size)) / 4
    want_NG = np.sort(score_NGJ)[..., -2:].sum(-1)
    np.testing.assert_array_equal(
        GROUP_SCORE["top2_sum"](jnp.float32(score_NGJ)), want_NG
    )
    score_NGJ[0, 0, -1] = np.nan
    got_NG = GROUP_SCORE["top2_sum"](jnp.float32(score_NGJ))
    assert np.isnan(got_NG).tolist() == [[True, False, False]] + 19 * [3 * [False]]


def test_the_group_scores_choose_differently():
    # Else the test above couldn't tell one from the other.
    score_NE, bias_E = scores(0, tokens=64)
    by_max = dataclasses.replace(CFG, group_score="max")
    one, other = (jit_route(score_NE, bias_E, c)[0].expert_NK for c in (CFG, by_max))
    assert (np.sort(one) != np.sort(other)).any()


@EXAMPLES
@given(SEEDS)
def test_a_token_visits_distinct_experts_of_at_most_so_many_groups(seed):
    (expert_NK, _), _ = jit_route(*scores(seed), CFG)
    for expert_K in np.asarray(expert_NK):
        assert len(set(expert_K)) == K
        assert len(set(expert_K // CFG.group_size)) <= CFG.groups_per_token


@EXAMPLES
@given(SEEDS)
def test_the_bias_moves_choices_but_never_weights(seed):
    score_NE, bias_E = scores(seed)
    plain, _ = jit_route(score_NE, np.zeros(E, np.float32), CFG)
    biased, _ = jit_route(score_NE, bias_E, CFG)
    assert (np.sort(biased.expert_NK) != np.sort(plain.expert_NK)).any()
    for routing in (plain, biased):
        raw_NK = np.take_along_axis(score_NE, np.asarray(routing.expert_NK), -1)
        want_NK = raw_NK / raw_NK.sum(-1, keepdims=True)
        np.testing.assert_allclose(routing.gate_NK, want_NK, rtol=1e-5)


def test_a_shift_of_every_bias_moves_nothing():
    score_NE, bias_E = scores(0)
    (here_NK, _), _ = jit_route(score_NE, bias_E, CFG)
    (there_NK, _), _ = jit_route(score_NE, bias_E + 4, CFG)
    np.testing.assert_array_equal(here_NK, there_NK)


def test_no_gradient_reaches_the_bias_and_the_gates_reaches_the_kernel():
    def total(state):
        (_, gate_NK), _ = apply(CFG, state, tokens())
        return (gate_NK * jnp.arange(K)).sum()

    gradients = jax.grad(total)(variables())
    assert not gradients["router_state"]["bias"].any()
    assert gradients["params"]["kernel"].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_gates_pass_on_the_gradients_of_their_closed_form(normalize):
    """gate_k = c s_k / S of the chosen scores' sum S: each of them moves all gates."""
    cfg = dataclasses.replace(CFG, normalize_gates=normalize, gate_scale=2.5)
    score_NE, bias_E = scores(0)
    (expert_NK, _), _ = jit_route(score_NE, bias_E, cfg)
    d_gate_NK = np.random.default_rng(1).normal(size=expert_NK.shape)
    _, pull = jax.vjp(lambda s: choices.gates(s, expert_NK, cfg), jnp.asarray(score_NE))
    (got_NE,) = pull(jnp.float32(d_gate_NK))

    chosen_NK = np.take_along_axis(score_NE.astype(np.float64), expert_NK, axis=-1)
    sum_N1 = chosen_NK.sum(-1, keepdims=True)
    d_score_NK = 2.5 * d_gate_NK
    if normalize:
        common_N1 = (d_score_NK * chosen_NK).sum(-1, keepdims=True) / sum_N1**2
        d_score_NK = d_score_NK / sum_N1 - common_N1
    want_NE = np.zeros(score_NE.shape)
    np.put_along_axis(want_NE, np.asarray(expert_NK), d_score_NK, axis=-1)
    np.testing.assert_allclose(got_NE, want_NE, rtol=1e-5, atol=1e-5)


def test_equal_scores_go_to_the_first_experts_in_equal_shares():
    state = jax.tree.map(jnp.zeros_like, variables())
    (expert_NK, gate_NK), measured = apply(CFG, state, tokens())
    assert np.sort(expert_NK).tolist() == [[0, 1, 2]] * 20
    np.testing.assert_allclose(gate_NK, 1 / K, rtol=1e-6)
    assert measured.load.load_E.tolist() == [20] * K + [0] * (E - K)


def test_scores_of_zero_give_gates_of_zero():
    (_, gate_NK), _ = jit_route(np.zeros((2, E), np.float32), np.zeros(E), CFG)
    assert gate_NK.tolist() == [[0.0] * K] * 2


@EXAMPLES
@given(st.lists(st.integers(0, E - 1), min_size=40, max_size=40))
def test_counts_are_exact_integers(chosen):
    got = rows.count(jnp.array(chosen).reshape(10, 4), E)
    assert got.dtype == jnp.int32
    assert got.tolist() == np.bincount(chosen, minlength=E).tolist()


def test_a_bfloat16_model_is_routed_in_float32():
    x_BTD = jnp.asarray(tokens(), jnp.bfloat16)
    (expert_NK, gate_NK), measured = apply(Z_LOSS, variables(), x_BTD)
    want, _ = apply(Z_LOSS, variables(), x_BTD.astype(jnp.float32))
    z_loss = measured.losses["router_z_loss"].value
    assert gate_NK.dtype == z_loss.dtype == jnp.float32
    np.testing.assert_array_equal(expert_NK, want.expert_NK)
    np.testing.assert_array_equal(gate_NK, want.gate_NK)


def test_logits_are_full_float32_products_where_a_gpu_would_round_to_tf32():
    lowered = apply.lower(CFG, variables(), tokens()).as_text()
    [product] = [line for line in lowered.splitlines() if "dot_general" in line]
    assert "precision = [HIGHEST, HIGHEST]" in product


@EXAMPLES
@given(SEEDS, st.sampled_from([1, 2, G]))
def test_margins_are_positive_exactly_where_an_expert_is_chosen(seed, groups):
    cfg = dataclasses.replace(CFG, groups_per_token=groups)
    score_NE, bias_E = scores(seed)
    biased_NE = score_NE + bias_E
    (expert_NK, _), _ = jit_route(score_NE, bias_E, cfg)
    reachable_NE, group_NG = choices.limit_to_groups(biased_NE, cfg)
    margin_NE = choices.selection_margins(biased_NE, reachable_NE, group_NG, cfg)
    chosen_NE = np.asarray(nn.one_hot(expert_NK, E)).sum(1) > 0
    np.testing.assert_array_equal(np.asarray(margin_NE) > 0, chosen_NE)


@pytest.mark.parametrize("rule", bias.UPDATE_RULES)
def test_only_rules_that_need_margins_pay_for_them(rule):
    cfg = dataclasses.replace(CFG, update_rule=rule)
    load = apply(cfg, variables(), tokens())[1].load
    assert load.margin_EM.dtype == jnp.int32
    if rule in bias.MARGIN_RULES:
        middle = load.margin_EM.shape[1] // 2
        np.testing.assert_array_equal(load.margin_EM[:, middle:].sum(1), load.load_E)
    else:
        assert load.margin_EM.shape == (E, 0)


@pytest.mark.parametrize("name", losses.AUXILIARY_LOSSES)
def test_the_auxiliary_loss_is_that_of_the_raw_scores(name):
    cfg = dataclasses.replace(CFG, auxiliary_loss=name, auxiliary_weight=0.5)
    state, x_BTD = variables(), tokens()
    routing, measured = apply(cfg, state, x_BTD)
    if name == "none":
        assert not measured.losses
        return
    score_BTE = nn.sigmoid(x_BTD @ state["params"]["kernel"])
    expert_BTK = routing.expert_NK.reshape(*x_BTD.shape[:2], K)
    want = losses.AUXILIARY_LOSSES[name](score_BTE, expert_BTK)
    found = measured.losses["aux_loss"]
    np.testing.assert_allclose(found.value, want, rtol=1e-6)
    assert found.weight == 0.5
    assert found.per == ("step" if name == "global_batch" else "microbatch")


def test_the_config_knows_the_same_scores():
    assert tuple(SCORES) == SCORE_NAMES
    assert tuple(GROUP_SCORE) == GROUP_SCORES


@pytest.mark.parametrize("loss", losses.AUXILIARY_LOSSES)
def test_tokens_that_are_not_real_choose_nobody_and_are_in_no_count(loss):
    cfg = dataclasses.replace(
        CFG, update_rule="quantile", auxiliary_loss=loss, z_loss_weight=1.0
    )
    x_BTD, is_real_BT = tokens(), np.ones((2, 10), bool)
    is_real_BT[:, 7:] = False
    got, measured = Router(cfg, 1.0).apply(variables(), x_BTD, Tokens(is_real_BT))
    want, wanted = apply(cfg, variables(), x_BTD[:, :7])
    expert_BTK, gate_BTK = (x.reshape(2, 10, K) for x in got)
    assert (expert_BTK[:, 7:] == E).all()
    np.testing.assert_array_equal(expert_BTK[:, :7], want.expert_NK.reshape(2, 7, K))
    np.testing.assert_allclose(gate_BTK[:, :7], want.gate_NK.reshape(2, 7, K), 1e-6)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(same, measured, wanted)
    assert measured.load.margin_EM.sum() == E * 14


def test_a_loss_of_whole_steps_counts_what_the_step_did():
    cfg = dataclasses.replace(CFG, auxiliary_loss="global_batch")
    alone, x_BTD = variables(), tokens()
    _, want = apply(cfg, alone, x_BTD)
    _, twice = apply(cfg, alone, np.concatenate([x_BTD, x_BTD]))
    # The same tokens again are a second microbatch: each has half of the loss.
    state = {"load": twice.load.load_E, **alone["router_state"]}
    _, got = apply(cfg, alone | {"router_state": state}, x_BTD)
    half, whole = (x.losses["aux_loss"].value for x in (got, want))
    np.testing.assert_allclose(2 * half, whole, rtol=1e-6)
