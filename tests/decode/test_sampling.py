"""Drawing one token: greedy, by temperature, from the nucleus."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.decode.sampling import sample

DRAWS = 20_000
PROBABILITY_V = np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32)
LOGITS_V = np.log(PROBABILITY_V) + 3.0  # logits are known up to a constant


def shares(temperature: float, top_p: float, seed: int = 0) -> np.ndarray:
    """How often each token is drawn."""
    logits_BV = jnp.broadcast_to(LOGITS_V, (DRAWS, len(LOGITS_V)))
    token_B = sample(logits_BV, jax.random.key(seed), temperature, top_p)
    assert token_B.dtype == jnp.int32
    return np.bincount(token_B, minlength=len(LOGITS_V)) / DRAWS


def test_temperature_0_takes_the_most_likely_token_of_each_row():
    logits_BV = jax.random.normal(jax.random.key(0), (6, 50))
    got_B = sample(logits_BV, jax.random.key(1), 0.0, 0.5)
    np.testing.assert_array_equal(got_B, logits_BV.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_in_proportion_to_their_tempered_probability(temperature):
    want_V = PROBABILITY_V ** (1 / temperature)
    got_V = shares(temperature, 1.0)
    np.testing.assert_allclose(got_V, want_V / want_V.sum(), atol=0.015)


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(1e-6, [1]), (0.39, [1]), (0.5, [1, 3]), (0.7, [1, 3, 2]), (0.99, range(5))],
)
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, nucleus):
    want_V = np.where(np.isin(np.arange(5), list(nucleus)), PROBABILITY_V, 0)
    got_V = shares(1.0, top_p)
    np.testing.assert_array_equal(got_V > 0, want_V > 0)
    np.testing.assert_allclose(got_V, want_V / want_V.sum(), atol=0.015)


def test_the_nucleus_follows_from_the_tempered_probabilities():
    # At a low temperature the first token alone reaches 0.5.
    assert shares(0.25, 0.5).tolist() == [0, 1, 0, 0, 0]


def test_a_key_decides_the_draw():
    draw = functools.partial(shares, 1.0, 0.9)
    assert draw(seed=0).tolist() == draw(seed=0).tolist() != draw(seed=1).tolist()
