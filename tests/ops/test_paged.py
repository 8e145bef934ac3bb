"""Caches in pages against caches in one piece, and attention to them in float64.

What no sequence has written is NaN, and rows of the table end in pages that aren't.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import paged
from tests import caches

PAGE, HEADS, SHARING, DIM, VALUE_DIM, SCALE = 4, 2, 3, 6, 5, 0.3
LENGTHS = [21, 3, 9, 16, 1]  # with the tokens of this step
TOKENS = [4, 2, 4, 3, 0]  # of each; the last is none


def positions():
    position_BQ = np.full((len(LENGTHS), max(TOKENS)), -1, np.int32)
    for row, length, tokens in zip(position_BQ, LENGTHS, TOKENS, strict=True):
        row[:tokens] = np.arange(length - tokens, length)
    return position_BQ


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def naive(q_BQGHX, k_BSGX, v_BSGV, position_BQ):
    """One query of one head at a time, in float64."""
    out = np.zeros((*q_BQGHX.shape[:-1], v_BSGV.shape[-1]))
    for b, q, g, h in np.ndindex(q_BQGHX.shape[:-1]):
        seen = slice(0, position_BQ[b, q] + 1)
        if position_BQ[b, q] >= 0:
            logits_S = SCALE * np.float64(k_BSGX[b, seen, g]) @ q_BQGHX[b, q, g, h]
            weight_S = np.exp(logits_S - logits_S.max())
            out[b, q, g, h] = weight_S / weight_S.sum() @ v_BSGV[b, seen, g]
    return out


def inputs():
    """Queries, those of no token NaN; keys; values."""
    size, longest = len(LENGTHS), max(LENGTHS)
    q_BQGHX = normal(size, max(TOKENS), HEADS, SHARING, DIM)
    q_BQGHX[positions() < 0] = np.nan
    return (
        q_BQGHX,
        normal(size, longest, HEADS, DIM),
        normal(size, longest, HEADS, VALUE_DIM)[::-1],
    )


@functools.partial(jax.jit, static_argnames="block")
def attend(q_BQGHX, k_pages, v_pages, sequences, *, block):
    del block  # another one is another program

    def read(page_WJ, is_there_WS):
        found = [paged.entries(x, page_WJ, is_there_WS) for x in (k_pages, v_pages)]
        return tuple(x.swapaxes(1, 2) for x in found)

    return paged.attend(
        q_BQGHX, sequences, read, page_size=PAGE, value_dim=VALUE_DIM, scale=SCALE
    )


def attended(dtype=jnp.float32, block=8):
    """What comes of the inputs, scattered over pages."""
    q_BQGHX, *cached = inputs()
    scattered = [caches.scatter(x, LENGTHS, PAGE) for x in cached]
    sequences = paged.Sequences(jnp.asarray(scattered[0][1]), jnp.asarray(positions()))
    arrays = [jnp.asarray(x, dtype) for x in (q_BQGHX, *(x for x, _ in scattered))]
    return attend(*arrays, sequences, block=block)


@pytest.mark.parametrize("block", [1, 40, 70, 512])
def test_tokens_of_unlike_sequences_attend_to_their_own_and_earlier_ones(
    block, monkeypatch
):
    monkeypatch.setattr(paged, "BLOCK", block)
    got = attended(block=block)
    want = naive(*inputs(), positions())
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not got[positions() < 0].any()


def test_in_bfloat16_only_the_rounding_differs():
    got = attended(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    want = naive(*inputs(), positions())
    np.testing.assert_allclose(got.astype(np.float32), want, atol=2**-5)


def test_as_many_pages_are_read_as_sequences_have(monkeypatch):
    """Each once, by as many at a time as there are sequences."""
    monkeypatch.setattr(paged, "BLOCK", PAGE)
    visited = []

    def read(page_WJ, is_there_WS):
        jax.debug.callback(visited.append, page_WJ[:, 0], ordered=True)
        return jnp.ones((3, 1, PAGE, DIM)), jnp.ones((3, 1, PAGE, VALUE_DIM))

    table_BM = np.arange(300, dtype=np.int32).reshape(3, 100)
    position_BQ = jnp.array([[PAGE * 5], [-1], [PAGE - 1]])
    out = paged.attend(
        jnp.ones((3, 1, 1, 1, DIM)),
        paged.Sequences(jnp.asarray(table_BM), position_BQ),
        read,
        page_size=PAGE,
        value_dim=VALUE_DIM,
        scale=SCALE,
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert len(visited) == 3
    want = [*table_BM[0, :6], table_BM[2, 0]]
    assert np.concatenate(visited)[: len(want)].tolist() == want


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tokens_are_written_where_they_belong_and_nothing_else_is(dtype):
    before = caches.scatter(normal(len(LENGTHS), 21, 2, 3), LENGTHS, PAGE)
    pages, table_BM = jnp.asarray(before[0], dtype), before[1]
    position_BQ = positions()
    new = normal(*position_BQ.shape, 2, 3)
    new[position_BQ < 0] = np.nan
    sequences = paged.Sequences(jnp.asarray(table_BM), jnp.asarray(position_BQ))
    got = jax.jit(paged.write)(pages, jnp.asarray(new), sequences)
    want = np.array(pages)
    for b, q in np.ndindex(position_BQ.shape):
        position = position_BQ[b, q]
        if position >= 0:
            want[table_BM[b, position // PAGE], position % PAGE] = new[b, q]
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.float32(got), np.float32(want))


def test_a_cache_that_is_given_away_is_written_in_place():
    def write_and_attend(pages_PKX, new_BQX, sequences):
        written = paged.write(pages_PKX, new_BQX, sequences)

        def read(page_WJ, is_there_WS):
            found = paged.entries(written, page_WJ, is_there_WS)[:, None]
            return found, found

        attended = paged.attend(
            new_BQX[:, :, None, None],
            sequences,
            read,
            page_size=PAGE,
            value_dim=DIM,
            scale=SCALE,
        )
        return written, attended

    table_BM, pages = caches.table(LENGTHS, PAGE, spare=10_000)
    cache = jnp.zeros((pages, PAGE, DIM))
    sequences = paged.Sequences(jnp.asarray(table_BM), jnp.asarray(positions()))
    new_BQX = jnp.zeros((*sequences.position_BQ.shape, DIM))
    program = jax.jit(write_and_attend, donate_argnums=0)
    memory = program.lower(cache, new_BQX, sequences).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 10


def test_a_sequences_entries_are_in_the_order_of_its_table():
    cache_BSX = normal(len(LENGTHS), max(LENGTHS), 2, 3)
    pages, table_BM = caches.scatter(cache_BSX, LENGTHS, PAGE)
    size = table_BM.shape[1] * PAGE
    is_there_BS = np.arange(size) < np.array(LENGTHS)[:, None]
    got = paged.entries(
        jnp.asarray(pages), jnp.asarray(table_BM), jnp.asarray(is_there_BS)
    )
    missing = [(0, 0), (0, size - max(LENGTHS)), (0, 0), (0, 0)]
    want = np.where(is_there_BS[..., None, None], np.pad(cache_BSX, missing), 0)
    np.testing.assert_array_equal(got, want)
