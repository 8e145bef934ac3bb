"""Auxiliary losses against loops over tokens, at balance, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import losses
from jmoe.config import model

switch, sequence = jax.jit(losses.switch), jax.jit(losses.sequence)
NAMES = ["switch", "sequence", "global_batch"]
EACH = pytest.mark.parametrize(
    "loss", [jax.jit(losses.AUXILIARY_LOSSES[name]) for name in NAMES], ids=NAMES
)
EXAMPLES = settings(deadline=None, max_examples=10)
SEEDS = st.integers(0, 2**31 - 1)


def scores(shape, seed=0):
    logits = 2 * np.random.default_rng(seed).normal(size=shape)
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def top_k(score_BTE, k):
    return np.argsort(-score_BTE, axis=-1, kind="stable")[..., :k].astype(np.int32)


def naive(score_TE, expert_TK):
    """One expert at a time, from the papers' equations."""
    (num_tokens, num_experts), k = score_TE.shape, expert_TK.shape[1]
    total = 0.0
    for e in range(num_experts):
        chosen = sum(e in row for row in expert_TK)
        mean = sum(row[e] / sum(row) for row in score_TE) / num_tokens
        total += num_experts / (k * num_tokens) * chosen * mean
    return total


@EXAMPLES
@given(SEEDS, st.sampled_from([1, 3]))
def test_switch_matches_a_loop_over_the_whole_batch(seed, k):
    score_BTE, other_BTE = scores((2, 5, 6), seed), scores((2, 5, 6), seed + 1)
    expert_BTK = top_k(other_BTE, k)
    want = naive(score_BTE.reshape(10, 6), expert_BTK.reshape(10, k))
    np.testing.assert_allclose(switch(score_BTE, expert_BTK), want, rtol=1e-5)


@EXAMPLES
@given(SEEDS, st.sampled_from([1, 3]))
def test_sequence_averages_a_loop_over_each_sequences_unbiased_choices(seed, k):
    score_BTE = scores((3, 5, 6), seed)
    biased_BTK = top_k(score_BTE + np.arange(6), k)
    unbiased_BTK = top_k(score_BTE, k)
    want = np.mean([naive(s, e) for s, e in zip(score_BTE, unbiased_BTK, strict=True)])
    np.testing.assert_allclose(sequence(score_BTE, biased_BTK), want, rtol=1e-5)


@EACH
def test_a_balanced_choice_of_balanced_scores_costs_exactly_one(loss):
    # Each token prefers two neighbours on a ring of eight, and each pair comes up once.
    row_E = np.array([4, 4, 2, 2, 1, 1, 1, 1], np.float32) / 16
    ring_TE = np.stack([np.roll(row_E, t) for t in range(8)])
    score_BTE = np.stack([ring_TE, ring_TE])
    assert float(loss(score_BTE, top_k(score_BTE, 2))) == 1.0


@EACH
def test_descent_takes_score_from_crowded_experts_and_gives_it_to_idle_ones(loss):
    def of_logits(logit_BTE):
        score_BTE = jax.nn.sigmoid(logit_BTE)
        return loss(score_BTE, jax.lax.top_k(score_BTE, 1)[1])

    logit_BTE = np.random.default_rng(1).normal([2, 0, 0, -2], size=(2, 32, 4))
    gradient_E = jax.jit(jax.grad(of_logits))(logit_BTE).sum((0, 1))
    assert gradient_E[0] > 0 > gradient_E[3]


@EACH
def test_the_gradient_is_that_of_the_scores_with_the_counts_held_fixed(loss):
    score_BTE = scores((1, 16, 6))
    expert_BTK = top_k(score_BTE, 2)
    share_E = 6 / 32 * np.bincount(expert_BTK.ravel(), minlength=6)

    def fixed(score_BTE):
        mean_E = (score_BTE / score_BTE.sum(-1, keepdims=True)).mean((0, 1))
        return (share_E * mean_E).sum()

    want = jax.jit(jax.grad(fixed))(score_BTE)
    got = jax.jit(jax.grad(loss))(score_BTE, expert_BTK)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


@EACH
def test_only_the_ratios_of_a_tokens_scores_count(loss):
    score_BTE, scale_BT1 = scores((2, 8, 4)), scores((2, 8, 1), seed=3)
    expert_BTK = top_k(score_BTE, 2)
    np.testing.assert_allclose(
        loss(score_BTE, expert_BTK), loss(score_BTE * scale_BT1, expert_BTK), rtol=1e-5
    )


def test_sequence_sees_the_imbalance_that_a_batch_evens_out():
    half_TE = np.tile(np.array([0.9, 0.8, 0.1, 0.2], np.float32), (8, 1))
    score_BTE = np.stack([half_TE, half_TE[:, ::-1]])
    expert_BTK = top_k(score_BTE, 2)
    np.testing.assert_allclose(switch(score_BTE, expert_BTK), 1.0, rtol=1e-6)
    assert sequence(score_BTE, expert_BTK) > 1.5


@pytest.mark.parametrize("name", losses.AUXILIARY_LOSSES)
def test_every_loss_is_a_float32_scalar(name):
    score_BTE = scores((2, 8, 4))
    got = jax.jit(losses.AUXILIARY_LOSSES[name])(score_BTE, top_k(score_BTE, 2))
    assert got.shape == () and got.dtype == jnp.float32


def test_no_loss_costs_nothing():
    score_BTE = scores((2, 8, 4))
    value, gradient_BTE = jax.value_and_grad(losses.none)(score_BTE, None)
    assert float(value) == 0 and not gradient_BTE.any()


def count(expert_BTK, num_experts=6):
    of_one = functools.partial(jnp.bincount, length=num_experts)
    return jax.vmap(lambda expert_TK: of_one(expert_TK.ravel()))(expert_BTK)


@pytest.mark.parametrize("name", NAMES)
def test_the_shares_of_divided_tokens_sum_to_the_loss_and_its_gradient(name):
    """Four sequences of eight tokens on 2 x 2 parts, counted together."""
    loss = losses.AUXILIARY_LOSSES[name]
    score_BTE = scores((4, 8, 6))
    expert_BTK = top_k(score_BTE, 2)

    def part(x, batch, position):
        return x[2 * batch : 2 * batch + 2, 4 * position : 4 * position + 4]

    def summed(score_BTE):
        total = 0.0
        for batch, position in np.ndindex(2, 2):
            rows = slice(2 * batch, 2 * batch + 2)
            spread = losses.Spread(
                over_batch=lambda _: count(expert_BTK).sum(0),
                over_sequence=lambda _, rows=rows: count(expert_BTK[rows]),
                over_step=lambda _: count(expert_BTK).sum(0),
                batch_parts=2,
            )
            parts = (part(x, batch, position) for x in (score_BTE, expert_BTK))
            total += loss(*parts, spread)
        return total

    got = jax.value_and_grad(summed)(score_BTE)
    want = jax.value_and_grad(loss)(score_BTE, expert_BTK)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-7), got, want
    )


@EXAMPLES
@given(SEEDS, st.sampled_from([1, 2, 4]))
def test_of_a_step_only_switch_depends_on_how_it_is_divided(seed, microbatches):
    """Against a loop over tokens, with all tokens, or a microbatch's, as one."""
    score_BTE = scores((4, 5, 6), seed)
    expert_BTK = top_k(scores((4, 5, 6), seed + 1), 2)
    step_E = count(expert_BTK).sum(0)

    def of_step(name, spread):
        parts = (np.split(x, microbatches) for x in (score_BTE, expert_BTK))
        loss = losses.AUXILIARY_LOSSES[name]
        total = sum(float(loss(*part, spread)) for part in zip(*parts, strict=True))
        return total if name in losses.OF_WHOLE_STEPS else total / microbatches

    def naive_mean(scores, experts, parts):
        pairs = zip(*(np.split(x, parts) for x in (scores, experts)), strict=True)
        return np.mean([naive(s.reshape(-1, 6), e.reshape(-1, 2)) for s, e in pairs])

    together = losses.Spread(over_step=lambda _: step_E)
    for name, experts, parts in [
        ("switch", expert_BTK, microbatches),
        ("global_batch", expert_BTK, 1),
        ("sequence", top_k(score_BTE, 2), 4),
    ]:
        want = naive_mean(score_BTE, experts, parts)
        np.testing.assert_allclose(of_step(name, together), want, rtol=1e-5)


@EACH
def test_padding_is_in_no_count_and_no_mean(loss):
    score_BTE, expert_BTK = scores((2, 8, 6)), top_k(scores((2, 8, 6), seed=1), 2)
    padded = expert_BTK.copy()
    padded[:, 5:] = 6  # nobody
    want = jax.value_and_grad(loss)(score_BTE[:, :5], expert_BTK[:, :5])
    got, gradient = jax.value_and_grad(loss)(score_BTE, padded)
    np.testing.assert_allclose(got, want[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :5], want[1], rtol=1e-5, atol=1e-8)
    assert not gradient[:, 5:].any()


@EACH
def test_a_batch_of_padding_alone_costs_nothing(loss):
    value, gradient = jax.value_and_grad(loss)(
        scores((2, 4, 6)), np.full((2, 4, 2), 6, np.int32)
    )
    assert float(value) == 0 and not gradient.any()


@EXAMPLES
@given(SEEDS)
def test_the_z_loss_is_the_sum_of_squared_log_partition_functions(seed):
    logit_BTE = np.random.default_rng(seed).normal(size=(2, 5, 6)).astype(np.float32)
    is_real_BT = np.arange(10).reshape(2, 5) % 3 > 0
    square_BT = np.log(np.exp(logit_BTE.astype(np.float64)).sum(-1)) ** 2
    got = losses.router_z(logit_BTE), losses.router_z(logit_BTE, is_real_BT)
    want = square_BT.sum(), square_BT[is_real_BT].sum()
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_config_knows_the_same_losses():
    assert tuple(losses.AUXILIARY_LOSSES) == model.AUXILIARY_LOSSES
    assert losses.OF_WHOLE_STEPS <= losses.AUXILIARY_LOSSES.keys()
