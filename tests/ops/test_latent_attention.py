"""Decoding from latents against the softmax that holds all scores at once.

Pages are in any order, and NaN where no sequence has written.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import paged
from jmoe.ops.latent_attention import latent_decode
from tests import caches

SCALE, PAGE = 0.2, 4
POSITIONS, HEADS, DIM, VALUE_DIM = 21, 3, 12, 8
LENGTHS = [21, 1, 0, 8, 16, 5]  # with the tokens that attend


def naive(q_BQHX, cache_BSX, tokens):
    q_BQHX, cache_BSX = (np.asarray(x, np.float64) for x in (q_BQHX, cache_BSX))
    out_BQHC = np.zeros((*q_BQHX.shape[:3], VALUE_DIM))
    for (b, q), position in np.ndenumerate(positions(tokens)):
        if position >= 0:
            cache_SX = cache_BSX[b, : position + 1]
            weight_HS = np.exp(SCALE * q_BQHX[b, q] @ cache_SX.T)
            weight_HS /= weight_HS.sum(-1, keepdims=True)
            out_BQHC[b, q] = weight_HS @ cache_SX[:, :VALUE_DIM]
    return out_BQHC


def positions(tokens):
    """Those of each sequence's last tokens; those of shorter sequences start later."""
    return np.array(LENGTHS, np.int32)[:, None] - tokens + np.arange(tokens)


def inputs(dtype=np.float32, tokens=1):
    """Queries and the cache in one piece, rounded to the dtype."""
    rng = np.random.default_rng(0)
    shapes = (len(LENGTHS), tokens, HEADS, DIM), (len(LENGTHS), POSITIONS, DIM)
    return [np.asarray(jnp.asarray(rng.normal(size=s), dtype)) for s in shapes]


@jax.jit
def decode(q_BQHX, pages_PKX, sequences):
    return latent_decode(q_BQHX, pages_PKX, sequences, value_dim=VALUE_DIM, scale=SCALE)


def in_pages(cache_BSX, tokens=1):
    pages_PKX, table_BM = caches.scatter(cache_BSX, LENGTHS, PAGE)
    sequences = paged.Sequences(jnp.asarray(table_BM), jnp.asarray(positions(tokens)))
    return jnp.asarray(pages_PKX, cache_BSX.dtype), sequences


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("block", [1, 48, 80, 512])
def test_blocks_of_any_size_give_the_naive_softmax(block, tokens, monkeypatch):
    monkeypatch.setattr(paged, "BLOCK", block)
    q_BQHX, cache_BSX = inputs(tokens=tokens)
    got = decode.__wrapped__(jnp.asarray(q_BQHX), *in_pages(cache_BSX, tokens))
    assert got.dtype == jnp.float32
    want = naive(q_BQHX, cache_BSX, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bfloat16_differs_from_float32_by_its_rounding():
    q_BQHX, cache_BSX = inputs(jnp.bfloat16)
    got = decode(q_BQHX, *in_pages(cache_BSX))
    assert got.dtype == jnp.bfloat16
    want = naive(q_BQHX, cache_BSX, 1)
    np.testing.assert_allclose(got.astype(np.float32), want, atol=2**-6)


def test_a_sequence_without_a_token_gives_zeros():
    q_BQHX, cache_BSX = inputs()
    pages_PKX, sequences = in_pages(cache_BSX)
    none = sequences._replace(position_BQ=jnp.full((len(LENGTHS), 1), -1))
    assert not decode(q_BQHX, pages_PKX, none).any()


def test_scores_in_the_thousands_overflow_nothing():
    q_BQHX, cache_BSX = inputs()
    got = decode(1000 * q_BQHX, *in_pages(cache_BSX))[:, 0]
    best_BHS = np.einsum("bqhx,bsx->bhs", q_BQHX, cache_BSX)
    some = np.array(LENGTHS) > 0
    is_there = np.arange(POSITIONS) < np.array(LENGTHS)[:, None, None]
    best_BH = np.where(is_there, best_BHS, -np.inf).argmax(-1)
    want = np.take_along_axis(cache_BSX[..., :VALUE_DIM], best_BH[..., None], axis=1)
    np.testing.assert_allclose(got[some], want[some], atol=1e-5)


def test_memory_does_not_grow_with_the_cache(monkeypatch):
    monkeypatch.setattr(paged, "BLOCK", 64)

    def temporary_bytes(length):
        q_BQHX, _ = inputs()
        table_BM = jnp.zeros((len(LENGTHS), length // PAGE), jnp.int32)
        sequences = paged.Sequences(table_BM, jnp.asarray(positions(1)))
        pages_PKX = jnp.zeros((table_BM.size, PAGE, DIM))
        compiled = jax.jit(decode.__wrapped__).lower(q_BQHX, pages_PKX, sequences)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 1.1 * temporary_bytes(512)
