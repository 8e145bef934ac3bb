"""Drawing a token of each row: how likely each is, and by what it is decided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy import stats

from jmoe.decode import sampling
from jmoe.decode.sampling import Draws

PROBABILITY_V = np.array([0.1, 0.4, 0.2, 0.25, 0.05])
LOGITS_V = np.float32(np.log(PROBABILITY_V) + 3.0)  # known up to a constant
SIZE = len(LOGITS_V)
ROWS = 10_000
NEUTRAL = {
    "temperature": np.float32(1),
    "top_k": np.int32(0),
    "top_p": np.float32(1),
    "min_p": np.float32(0),
    "penalty": np.float32(1),
    "seed": np.uint32(0),
}


def draws(rows: int, **parameters) -> Draws:
    """The parameters of rows, each a number or one for each row."""
    assert parameters.keys() <= NEUTRAL.keys()
    every = {
        name: np.broadcast_to(np.asarray(parameters.get(name, x), x.dtype), rows)
        for name, x in NEUTRAL.items()
    }
    return Draws(**every)


@functools.partial(jax.jit, static_argnames="num_top")
def sample(logits_BV, given, position_B, seen_BV=None, num_top=0):
    if seen_BV is None:
        seen_BV = jnp.zeros(logits_BV.shape, bool)
    return sampling.sample(logits_BV, given, position_B, lambda: seen_BV, num_top)


def drawn(logits_V=LOGITS_V, *, position_B=None, seen_V=None, **parameters):
    """A token for each of many rows of the same logits: by default each has a seed."""
    seed = {"seed": np.arange(ROWS)} if position_B is None else {}
    position_B = np.full(ROWS, 7) if position_B is None else position_B
    seen_V = np.zeros(len(logits_V), bool) if seen_V is None else seen_V
    logits_BV, seen_BV = (np.tile(x, (ROWS, 1)) for x in (logits_V, seen_V))
    given = draws(ROWS, **seed, **parameters)
    found = sample(logits_BV, given, np.int32(position_B), seen_BV)
    assert found.token.dtype == jnp.int32
    return np.asarray(found.token)


def assert_drawn_by(token_B: np.ndarray, share_V: np.ndarray) -> None:
    """A chi-square test, and nothing that can't occur."""
    count_V = np.bincount(token_B, minlength=len(share_V))
    assert not count_V[share_V == 0].any()
    is_drawn_V = share_V > 0
    want_V = share_V[is_drawn_V] / share_V.sum() * len(token_B)
    if len(want_V) > 1:
        assert stats.chisquare(count_V[is_drawn_V], want_V).pvalue > 1e-3


CASES = {
    "temperature=1": ({}, PROBABILITY_V),
    "temperature=0.5": ({"temperature": 0.5}, PROBABILITY_V**2),
    "temperature=2": ({"temperature": 2.0}, PROBABILITY_V**0.5),
    "top_k=1": ({"top_k": 1}, [0, 1, 0, 0, 0]),
    "top_k=3": ({"top_k": 3}, [0, 0.4, 0.2, 0.25, 0]),
    "top_k=9": ({"top_k": 9}, PROBABILITY_V),
    "top_p=0.000001": ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),
    "top_p=0.39": ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
    "top_p=0.5": ({"top_p": 0.5}, [0, 0.4, 0, 0.25, 0]),
    "top_p=0.9": ({"top_p": 0.9}, [0.1, 0.4, 0.2, 0.25, 0]),
    "top_p of tempered": ({"temperature": 0.25, "top_p": 0.5}, [0, 1, 0, 0, 0]),
    # Of the 0.85 that are left, 0.4 and 0.25 are 0.76.
    "top_p of top_k": ({"top_k": 3, "top_p": 0.74}, [0, 0.4, 0, 0.25, 0]),
    "min_p=0.3": ({"min_p": 0.3}, [0, 0.4, 0.2, 0.25, 0]),
    "min_p=1": ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
}


@pytest.mark.parametrize(("parameters", "share_V"), CASES.values(), ids=CASES)
def test_tokens_are_drawn_in_proportion_to_their_probability(parameters, share_V):
    share_V = np.array(share_V)
    assert_drawn_by(drawn(**parameters), share_V)
    one_seed = drawn(position_B=np.arange(ROWS), seed=5, **parameters)
    assert_drawn_by(one_seed, share_V)


def test_tokens_of_successive_positions_and_of_successive_seeds_are_independent():
    pair_VV = np.outer(PROBABILITY_V, PROBABILITY_V)
    token_B, next_B = drawn(), drawn(position_B=np.full(ROWS, 8), seed=np.arange(ROWS))
    assert_drawn_by(SIZE * token_B + next_B, pair_VV.ravel())
    assert_drawn_by(SIZE * token_B[::2] + token_B[1::2], pair_VV.ravel())
    # Nor is a seed's position the next seed's position before it.
    assert_drawn_by(SIZE * token_B[1:] + next_B[:-1], pair_VV.ravel())


def test_temperature_0_takes_the_most_likely_token_and_of_equal_ones_the_first():
    logits_BV = np.array(jax.random.normal(jax.random.key(0), (6, 50)))
    logits_BV[3, [41, 17, 30]] = 9.0
    given = draws(6, temperature=0, top_k=2, top_p=0.5, min_p=0.1)
    token_B = sample(logits_BV, given, np.arange(6)).token
    np.testing.assert_array_equal(token_B, logits_BV.argmax(-1))
    assert token_B[3] == 17


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 2e-38, 1e-44])
def test_a_temperature_close_to_0_is_greedy(temperature):
    logits_V = np.float32([-30.0, 29.0, 30.0, -np.inf, 3.0])
    assert (drawn(logits_V, temperature=temperature) == 2).all()


def test_each_row_has_its_own_parameters_and_knows_of_no_other():
    every = [parameters for parameters, _ in CASES.values()] + [{"temperature": 0}]
    rows = len(every)
    columns = {name: [x.get(name, NEUTRAL[name]) for x in every] for name in NEUTRAL}
    given = draws(rows, **{**columns, "seed": np.arange(rows) // 2})
    logits_BV = np.array(jax.random.normal(jax.random.key(1), (rows, SIZE)))
    logits_BV[-1] = 2.0  # of equal ones, the greedy row takes the first
    operands = logits_BV, given, np.arange(rows) // 3
    together_B = np.asarray(sample(*operands).token)
    for i, token in enumerate(together_B):
        row = jax.tree.map(lambda x, i=i: x[i : i + 1], operands)
        assert sample(*row).token[0] == token
    backwards = jax.tree.map(lambda x: x[::-1], operands)
    np.testing.assert_array_equal(sample(*backwards).token[::-1], together_B)


def test_the_penalty_makes_what_occurred_less_likely_whatever_its_sign():
    logits_V, seen_V = np.float32([1.5, -1.0, -1.0, 1.0]), np.array([1, 1, 0, 0], bool)
    want_V = np.exp([1.5 / 2, -1.0 * 2, -1.0, 1.0])
    assert_drawn_by(drawn(logits_V, seen_V=seen_V, penalty=2.0), want_V)
    greedy = {"seen_V": seen_V, "temperature": 0}
    assert (drawn(logits_V, **greedy, penalty=2.0) == 3).all()
    assert (drawn(logits_V, **greedy) == 0).all()


def kept_by_a_sort(logits_V, top_k, top_p, min_p):
    """Which tokens are drawn from, in float64, of logits of one row."""
    logits_V = np.float64(logits_V)
    share_V = np.exp(logits_V - logits_V.max())
    ascending_V = np.sort(logits_V)
    least = ascending_V[-top_k] if 0 < top_k < len(logits_V) else -np.inf
    kept_V = logits_V >= least
    of_k = np.where(kept_V, share_V, 0)
    if top_p < 1:
        order_V = np.argsort(-logits_V)
        before_V = np.cumsum(of_k[order_V]) - of_k[order_V]
        last = order_V[before_V < top_p * of_k.sum()][-1]
        kept_V &= logits_V >= logits_V[last]
    return kept_V & (share_V >= min_p)


def logits_of_all_kinds(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Ties, masked tokens, and spreads from hardly any to 1e30; the largest is 0."""
    spread_B1 = 10.0 ** rng.choice([-6, -1, 0, 1, 30], size=(rows, 1))
    logits_BV = rng.normal(size=(rows, size)) * spread_B1
    is_tied_B1 = rng.random((rows, 1)) < 0.5
    logits_BV = np.where(is_tied_B1, np.round(logits_BV), logits_BV)
    is_masked_BV = rng.random((rows, size)) < rng.choice([0, 0.5, 1], size=(rows, 1))
    is_masked_BV[:, 0] = False
    logits_BV = np.float32(np.where(is_masked_BV, -np.inf, logits_BV))
    return logits_BV - logits_BV.max(-1, keepdims=True)


def test_what_is_drawn_from_is_what_a_sort_finds():
    rows, size = 600, 40
    rng = np.random.default_rng(0)
    logits_BV = logits_of_all_kinds(rng, rows, size)
    given = draws(
        rows,
        top_k=rng.choice([0, 1, 2, 7, size, 2**31 - 1], rows),
        top_p=rng.choice([1e-6, 0.3, 0.9, 0.999, 1.0], rows),
        min_p=rng.choice([0.0, 0.0, 0.05, 1.0], rows),
    )
    got_BV = np.asarray(jax.jit(sampling._filtered)(logits_BV, given))
    is_kept_BV = got_BV > -np.inf
    np.testing.assert_array_equal(got_BV[is_kept_BV], logits_BV[is_kept_BV])
    for i, is_kept_V in enumerate(is_kept_BV):
        k, p, least = given.top_k[i], given.top_p[i], given.min_p[i]
        # Sums that are as near to a threshold as float32 is exact may go either way.
        bounds = [
            kept_by_a_sort(logits_BV[i], k, p * by if p < 1 else p, least / by)
            & (logits_BV[i] > -np.inf)
            for by in (1 - 1e-5, 1 + 1e-5)
        ]
        assert (bounds[0] <= is_kept_V).all() and (is_kept_V <= bounds[1]).all(), i


def test_log_probabilities_are_the_models_own_and_the_likeliest_are_in_order():
    rows, size, most = 8, 30, 4
    logits_BV = 3 * np.array(jax.random.normal(jax.random.key(2), (rows, size)))
    given = draws(rows, temperature=2.0, top_k=2, penalty=3.0, seed=range(rows))
    seen_BV = np.ones((rows, size), bool)
    found = sample(logits_BV, given, np.arange(rows), seen_BV, num_top=most)
    want_BV = jax.nn.log_softmax(logits_BV)
    want_B = np.take_along_axis(want_BV, found.token[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(found.logprob, want_B, rtol=1e-5, atol=1e-5)
    likely_BN, token_BN = jax.lax.top_k(want_BV, most)
    np.testing.assert_array_equal(found.top_token, token_BN)
    np.testing.assert_allclose(found.top_logprob, likely_BN, rtol=1e-5, atol=1e-5)
    none = sample(logits_BV, given, np.arange(rows), seen_BV)
    assert none.top_token.shape == none.top_logprob.shape == (rows, 0)


@pytest.mark.parametrize("devices", [2, 8])
def test_a_vocabulary_that_is_divided_gives_the_same_tokens(devices):
    rows, size, most = 64, 40, 7  # more likely tokens than a device has
    rng = np.random.default_rng(1)
    logits_BV = np.float32(np.round(rng.normal(size=(rows, size)), 1))  # with ties
    seen_BV = rng.random((rows, size)) < 0.3
    given = draws(
        rows,
        temperature=rng.choice([0, 0.7, 1.5], rows),
        top_k=rng.choice([0, 5], rows),
        top_p=rng.choice([0.6, 1.0], rows),
        min_p=rng.choice([0.0, 0.1], rows),
        penalty=rng.choice([1.0, 1.5], rows),
        seed=rng.integers(2**32, size=rows),
    )
    run = functools.partial(sample, num_top=most)
    mesh = jax.make_mesh((devices,), ("tensor",), axis_types=(AxisType.Auto,))
    divided, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    specs = (divided, whole, whole, divided)
    on_mesh = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False
    )
    operands = logits_BV, given, np.arange(rows), seen_BV
    want, got = run(*operands), jax.jit(on_mesh)(*operands)
    np.testing.assert_array_equal(got.token, want.token)
    np.testing.assert_array_equal(got.top_token, want.top_token)
    np.testing.assert_allclose(got.logprob, want.logprob, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.top_logprob, want.top_logprob, rtol=1e-5, atol=1e-6)
