"""Bias rules: exact integers, shared invariants, and balance from skewed routers."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jmoe.balance import bias, load
from jmoe.config import model

ALL_RULES = pytest.mark.parametrize("name", bias.UPDATE_RULES)
EXAMPLES = settings(deadline=None, max_examples=25)
COUNTS = st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=5)
BIAS_E = np.random.default_rng(1).normal(size=8).astype(np.float32)

histogram = jax.jit(bias.margin_histogram, static_argnames="num_bins")


@functools.partial(jax.jit, static_argnums=0)
def update(name, bias_E, load_E, margin_EM, rate=0.1):
    rule = bias.UPDATE_RULES[name]
    return rule(bias_E, load_E, rate=rate, margin_EM=margin_EM)


@functools.partial(jax.jit, static_argnums=1)
def counted(biased_TE, top_k):
    """The load and the margins of one batch, chosen without groups."""
    expert_TK = jax.lax.top_k(biased_TE, top_k)[1]
    load_E = jnp.bincount(expert_TK.ravel(), length=biased_TE.shape[-1])
    margin_TE = biased_TE - bias.selection_threshold(biased_TE, top_k)[:, None]
    return load_E, margin_TE


def skewed_batch(num_tokens=64, seed=0):
    logit_TE = np.random.default_rng(seed).normal(size=(num_tokens, 8))
    score_TE = 1 / (1 + np.exp(-logit_TE - np.linspace(0, 1.5, 8) ** 2))
    return score_TE.astype(np.float32)


def statistics(score_TE):
    load_E, margin_TE = counted(score_TE, 2)
    return load_E, histogram(margin_TE)


@EXAMPLES
@given(COUNTS)
@example([2**24 + 1, 2**24, 2**24])  # equal as float32
@example([2**31 - 1, 2**31 - 1, 2**31 - 2])  # E * load and the total overflow int32
def test_sign_compares_with_the_mean_exactly(counts):
    mean = Fraction(sum(counts), len(counts))
    want = [float((mean > count) - (mean < count)) for count in counts]
    zero_E, load_E = np.zeros(len(counts), np.float32), np.array(counts, np.int32)
    got = update("sign", zero_E, load_E, None, 1.0)
    assert got.tolist() == want


@EXAMPLES
@given(COUNTS)
def test_proportional_steps_by_the_relative_shortfall(counts):
    mean = sum(counts) / len(counts)
    want = [(mean - count) / mean if mean else 0.0 for count in counts]
    zero_E, load_E = np.zeros(len(counts), np.float32), np.array(counts, np.int32)
    got = update("proportional", zero_E, load_E, None, 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@ALL_RULES
def test_rate_zero_freezes_the_bias_to_the_bit(name):
    got = update(name, BIAS_E, *statistics(skewed_batch()), 0.0)
    np.testing.assert_array_equal(got, BIAS_E)


@ALL_RULES
@pytest.mark.parametrize("num_experts", [1, 3])
def test_an_empty_batch_moves_nothing(name, num_experts):
    bias_E = BIAS_E[:num_experts]
    load_E = jnp.zeros(num_experts, jnp.int32)
    margin_EM = jnp.zeros((num_experts, 16), jnp.int32)
    got = update(name, bias_E, load_E, margin_EM)
    np.testing.assert_array_equal(got, bias_E)


@ALL_RULES
def test_a_balanced_batch_moves_nothing(name):
    # On a ring every expert sees the same scores, each from another token.
    row_E = skewed_batch()[0]
    ring_TE = np.stack([np.roll(row_E, t) for t in range(8)])
    got = update(name, BIAS_E, *statistics(ring_TE))
    np.testing.assert_array_equal(got, BIAS_E)


@ALL_RULES
def test_the_busiest_expert_is_lowered_and_the_idlest_raised(name):
    load_E, margin_EM = statistics(skewed_batch())
    got = update(name, 0 * BIAS_E, load_E, margin_EM)
    assert got[load_E.argmax()] < 0 < got[load_E.argmin()]


@pytest.mark.parametrize("name", ["sign_centered", "proportional", "quantile"])
def test_rules_other_than_sign_keep_the_mean_of_the_bias(name):
    batch = statistics(skewed_batch())
    drift = update("sign", BIAS_E, *batch).mean() - BIAS_E.mean()
    assert abs(drift) > 1e-3  # else this batch shows nothing
    np.testing.assert_allclose(
        update(name, BIAS_E, *batch).mean(), BIAS_E.mean(), rtol=0, atol=1e-6
    )


@ALL_RULES
def test_layers_move_alone_whether_stacked_or_mapped(name):
    batches = [statistics(skewed_batch(seed=seed)) for seed in range(3)]
    load_LE, margin_LEM = map(jnp.stack, zip(*batches, strict=True))
    bias_LE = np.stack([BIAS_E, -BIAS_E, 2 * BIAS_E])
    alone = [update(name, bias_LE[layer], *batches[layer]) for layer in range(3)]
    stacked = update(name, bias_LE, load_LE, margin_LEM)
    mapped = jax.vmap(functools.partial(update, name))(bias_LE, load_LE, margin_LEM)
    assert stacked.dtype == jnp.float32
    np.testing.assert_allclose(stacked, np.stack(alone), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(mapped, stacked, rtol=1e-6, atol=1e-7)


@ALL_RULES
def test_each_layer_moves_by_its_own_rate(name):
    batches = [statistics(skewed_batch(seed=seed)) for seed in range(3)]
    load_LE, margin_LEM = map(jnp.stack, zip(*batches, strict=True))
    bias_LE, rate_L = np.stack([BIAS_E, -BIAS_E, 2 * BIAS_E]), [0.0, 0.1, 0.3]
    got = update(name, bias_LE, load_LE, margin_LEM, np.float32(rate_L)[:, None])
    alone = [
        update(name, bias_LE[layer], *batches[layer], rate)
        for layer, rate in enumerate(rate_L)
    ]
    np.testing.assert_array_equal(got[0], bias_LE[0])
    np.testing.assert_allclose(got, np.stack(alone), rtol=1e-6, atol=1e-7)
    assert (np.abs(got - bias_LE).max(-1) > 0).tolist() == [False, True, True]


def test_quantile_knows_no_rate_but_on_and_off():
    batch = statistics(skewed_batch())
    steps = [update("quantile", BIAS_E, *batch, rate) for rate in (1e-4, 1.0)]
    np.testing.assert_array_equal(*steps)


def test_a_shift_of_the_whole_bias_changes_no_step_of_quantile():
    score_TE = skewed_batch()
    near = update("quantile", BIAS_E, *statistics(score_TE)) - BIAS_E
    far = update("quantile", BIAS_E + 4, *statistics(score_TE + 4)) - (BIAS_E + 4)
    np.testing.assert_allclose(near, far, atol=1e-3)


@EXAMPLES
@given(st.integers(0, 2**31 - 1), st.sampled_from([2, 16, 128]))
def test_the_histogram_counts_margins_between_its_documented_edges(seed, num_bins):
    rng = np.random.default_rng(seed)
    margin_TE = rng.uniform(-1.5, 1.5, (40, 3)) * rng.choice([1, 1e-3], (40, 3))
    edges = bias.bin_edges(num_bins)
    distance = np.abs(margin_TE[..., None] - edges[1:-1]).min(-1)
    margin_TE = np.where(distance < 1e-6, 0.5, margin_TE).astype(np.float32)
    got = histogram(margin_TE, num_bins=num_bins)
    clipped_TE = np.clip(margin_TE, -1, 1)
    want = [np.histogram(clipped_TE[:, e], edges)[0] for e in range(3)]
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("cut", [1, 32, 63])
def test_histograms_of_parts_add_up_to_the_whole_exactly(cut):
    _, margin_TE = counted(skewed_batch(), 2)
    parts = histogram(margin_TE[:cut]) + histogram(margin_TE[cut:])
    np.testing.assert_array_equal(parts, histogram(margin_TE))


def test_bins_above_zero_hold_the_load():
    load_E, margin_EM = statistics(skewed_batch())
    np.testing.assert_array_equal(margin_EM[:, bias.NUM_BINS // 2 :].sum(-1), load_E)
    np.testing.assert_array_equal(margin_EM.sum(-1), 64)


def test_infinite_margins_count_in_the_outermost_bins():
    got = histogram(np.array([[-np.inf, np.inf]], np.float32), num_bins=4)
    assert got.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


@EXAMPLES
@given(st.integers(0, 2**31 - 1))
def test_quantile_interpolates_the_histogram_at_the_exact_mean_load(seed):
    rng = np.random.default_rng(seed)
    margin_EM = rng.integers(1, 50, (3, 8), np.int32)
    load_E = rng.integers(0, margin_EM.sum(-1).min(), 3, np.int32)
    tail_EM = np.cumsum(margin_EM[:, ::-1], axis=-1)  # above each edge, from the last
    edges = bias.bin_edges(8)[::-1]
    q_E = [np.interp(load_E.mean(), [0, *tail_M], edges) for tail_M in tail_EM]
    got_E = update("quantile", 0 * BIAS_E[:3], load_E, margin_EM)
    np.testing.assert_allclose(got_E, (np.mean(q_E) - q_E) / 4, atol=1e-6)


def test_quantile_finds_the_margin_that_a_fair_share_exceeds():
    load_E, margin_TE = counted(skewed_batch(num_tokens=4096), 2)
    got_E = update("quantile", 0 * BIAS_E, load_E, histogram(margin_TE))
    exact_E = jnp.quantile(margin_TE, 1 - 2 / 8, axis=0)
    want_E = (exact_E.mean() - exact_E) / 4
    np.testing.assert_allclose(got_E, want_E, atol=1e-3)  # a fifth of a bin's quarter


def test_where_every_expert_is_chosen_the_threshold_is_no_hurdle():
    assert bias.selection_threshold(skewed_batch(), 8).tolist() == [-jnp.inf] * 64


def test_the_threshold_lies_between_the_last_choice_and_the_next():
    score_TE = np.array([[0.75, 0.25, 0.5, 0.0], [0.0, 0.0, 1.0, 0.5]])
    assert bias.selection_threshold(score_TE, 2).tolist() == [0.375, 0.25]


@pytest.mark.parametrize("num_bins", [0, 3, -2])
def test_an_odd_or_missing_number_of_bins_is_refused(num_bins):
    with pytest.raises(ValueError, match=f"num_bins={num_bins} must be even"):
        histogram(np.zeros((2, 2)), num_bins=num_bins)


@ALL_RULES
def test_only_margin_rules_ask_for_margins(name):
    load_E = np.arange(8, dtype=np.int32)
    if name in bias.MARGIN_RULES:
        with pytest.raises(ValueError, match="margin_EM=None"):
            update(name, BIAS_E, load_E, None)
    else:
        assert (update(name, BIAS_E, load_E, None) != BIAS_E).any()


def test_an_unknown_rule_is_refused_with_the_known_ones():
    assert bias.update_rule("sign") is bias.sign
    with pytest.raises(ValueError, match="'median'; known: sign, sign_centered"):
        bias.update_rule("median")


def test_the_config_knows_the_same_rules():
    assert tuple(bias.UPDATE_RULES) == model.UPDATE_RULES
    assert bias.MARGIN_RULES == set(model.MARGIN_RULES)


# A router at a standstill: fresh tokens each step, some experts far more popular.
EXPERTS, TOP_K, TOKENS, DIM = 32, 4, 512, 16
FREE, GROUPED = (1, 1), (8, 2)  # groups, groups a token may visit


def skewed_scores(key):
    offset_E = jax.random.normal(jax.random.key(10), (EXPERTS,))
    w_DE = jax.random.normal(jax.random.key(11), (DIM, EXPERTS)) / DIM**0.5
    return jax.nn.sigmoid(jax.random.normal(key, (TOKENS, DIM)) @ w_DE + offset_E)


def choose(score_TE, bias_E, groups):
    """DeepSeek-V3's choice: groups by their two best experts, then experts."""
    num_groups, groups_per_token = groups
    biased_TE = score_TE + bias_E
    best_TG2, _ = jax.lax.top_k(biased_TE.reshape(TOKENS, num_groups, -1), 2)
    group_TG = best_TG2.sum(-1)
    group_TG -= bias.selection_threshold(group_TG, groups_per_token)[:, None]
    group_TE = jnp.repeat(group_TG, EXPERTS // num_groups, axis=-1)
    reachable_TE = jnp.where(group_TE > 0, biased_TE, -jnp.inf)
    load_E, _ = counted(reachable_TE, TOP_K)
    cut_T = bias.selection_threshold(reachable_TE, TOP_K)
    return load_E, jnp.minimum(biased_TE - cut_T[:, None], group_TE)


@functools.partial(jax.jit, static_argnames=("name", "steps", "groups"))
def train(name, rate, steps, groups):
    """Updates a bias of 0; returns it with the global MaxVio of 16 fresh batches."""

    def step(bias_E, key):
        load_E, margin_TE = choose(skewed_scores(key), bias_E, groups)
        margin_EM = bias.margin_histogram(margin_TE)
        return update(name, bias_E, load_E, margin_EM, rate), None

    def fresh_load(key):
        return choose(skewed_scores(key), bias_E, groups)[0]

    keys = jax.random.split(jax.random.key(12), steps)
    bias_E, _ = jax.lax.scan(step, jnp.zeros(EXPERTS), keys)
    load_NE = jax.lax.map(fresh_load, jax.random.split(jax.random.key(13), 16))
    return bias_E, load.max_violation(load_NE.sum(0))


@pytest.mark.parametrize(
    ("name", "rate", "steps", "groups"),
    [
        ("sign", 2e-3, 400, FREE),
        ("sign_centered", 2e-3, 400, FREE),
        ("proportional", 1e-2, 100, FREE),
        ("quantile", 1.0, 30, FREE),
        ("sign", 2e-3, 400, GROUPED),
        ("quantile", 1.0, 30, GROUPED),
    ],
)
def test_each_rule_balances_a_skewed_router(name, rate, steps, groups):
    _, global_violation = train(name, rate, steps, groups)
    assert global_violation < 0.2


def test_a_frozen_bias_leaves_the_router_skewed():
    bias_E, global_violation = train("sign", 0.0, 400, FREE)
    assert global_violation > 2 and not bias_E.any()
