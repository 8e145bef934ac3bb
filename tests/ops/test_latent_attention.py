"""Decoding from latents against the softmax that holds all scores at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import latent_attention
from jmoe.ops.latent_attention import latent_decode

SCALE = 0.2
POSITIONS, HEADS, DIM, VALUE_DIM = 21, 3, 12, 8
LENGTHS = [21, 1, 0, 8, 16, 5]


def naive(q_BHX, cache_BSX, length_B):
    q_BHX, cache_BSX = (np.asarray(x, np.float64) for x in (q_BHX, cache_BSX))
    out_BHC = np.zeros((*q_BHX.shape[:2], VALUE_DIM))
    for b, length in enumerate(length_B):
        if length:
            cache_SX = cache_BSX[b, :length]
            weight_HS = np.exp(SCALE * q_BHX[b] @ cache_SX.T)
            weight_HS /= weight_HS.sum(-1, keepdims=True)
            out_BHC[b] = weight_HS @ cache_SX[:, :VALUE_DIM]
    return out_BHC


def inputs(dtype=jnp.float32, positions=POSITIONS):
    rng = np.random.default_rng(0)
    shapes = (len(LENGTHS), HEADS, DIM), (len(LENGTHS), positions, DIM)
    return *(jnp.asarray(rng.normal(size=s), dtype) for s in shapes), np.array(LENGTHS)


def decode(q_BHX, cache_BSX, length_B):
    return latent_decode(
        q_BHX, cache_BSX, jnp.asarray(length_B), value_dim=VALUE_DIM, scale=SCALE
    )


@pytest.mark.parametrize("block", [1, 7, 8, 21, 64])
def test_blocks_of_any_size_give_the_naive_softmax(block, monkeypatch):
    monkeypatch.setattr(latent_attention, "BLOCK", block)
    got = decode(*inputs())
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, naive(*inputs()), rtol=1e-5, atol=1e-6)


def test_bfloat16_differs_from_float32_by_its_rounding():
    arrays = inputs(jnp.bfloat16)
    got = decode(*arrays)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), naive(*arrays), atol=2**-6)


def test_a_sequence_of_no_positions_gives_zeros():
    q_BHX, cache_BSX, _ = inputs()
    assert not decode(q_BHX, cache_BSX, np.zeros(len(LENGTHS), np.int32)).any()


def test_scores_in_the_thousands_overflow_nothing():
    q_BHX, cache_BSX, length_B = inputs()
    got = decode(1000 * q_BHX, cache_BSX, length_B)
    best_BHS = np.einsum("bhx,bsx->bhs", q_BHX, cache_BSX)
    is_there = np.arange(POSITIONS) < length_B[:, None, None]
    best_BHS = np.where(is_there, best_BHS, -np.inf)
    want = np.take_along_axis(
        np.asarray(cache_BSX)[:, :, :VALUE_DIM], best_BHS.argmax(-1)[..., None], axis=1
    )
    some = length_B > 0
    np.testing.assert_allclose(got[some], want[some], atol=1e-5)


def test_what_lies_beyond_a_length_changes_nothing():
    q_BHX, cache_BSX, length_B = inputs()
    beyond = np.arange(POSITIONS)[:, None] >= length_B[:, None, None]
    changed = decode(q_BHX, jnp.where(beyond, 1e6, cache_BSX), length_B)
    np.testing.assert_array_equal(changed, decode(q_BHX, cache_BSX, length_B))


def test_memory_does_not_grow_with_the_cache(monkeypatch):
    monkeypatch.setattr(latent_attention, "BLOCK", 64)

    def temporary_bytes(positions):
        compiled = jax.jit(decode).lower(*inputs(positions=positions)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 1.1 * temporary_bytes(512)
