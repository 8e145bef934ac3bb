"""Blockwise attention against the softmax that holds all scores at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops.attention import attention

SCALE = 0.3
B, H, Q, V = 2, 4, 8, 6
ONE_DOCUMENT = None
# Blocks of 5 see a boundary between blocks, within one, and a document of one token.
DOCUMENTS = np.array([[3] * 5 + [1] * 8, [0] * 7 + [1] + [2] * 5], np.int32)
ALTERNATING = np.tile(np.arange(12, dtype=np.int32) % 2, (B, 1))

CASES = {  # sequence length, block size, segments
    "one_block": (9, 64, ONE_DOCUMENT),
    "blocks_divide": (12, 4, ALTERNATING),
    "blocks_do_not_divide": (13, 5, ONE_DOCUMENT),
    "documents": (13, 5, DOCUMENTS),
    "blocks_of_one": (5, 1, ONE_DOCUMENT),
}


def naive(q_BTHQ, k_BTKQ, v_BTKV, segment_BT):
    group = q_BTHQ.shape[2] // k_BTKQ.shape[2]
    k_BTHQ, v_BTHV = (jnp.repeat(x, group, axis=2) for x in (k_BTKQ, v_BTKV))
    logits = SCALE * jnp.einsum("bqhd,bkhd->bhqk", q_BTHQ, k_BTHQ)
    position_T = jnp.arange(q_BTHQ.shape[1])
    allowed = position_T[:, None] >= position_T
    if segment_BT is not None:
        same_BTT = segment_BT[:, :, None] == segment_BT[:, None]
        allowed = allowed & same_BTT[:, None]
    weights = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhv->bqhv", weights, v_BTHV)


def inputs(length, dtype=np.float32, *, kv_heads=H):
    rng = np.random.default_rng(0)
    heads = (H, kv_heads, kv_heads, H)
    dims = zip(heads, (Q, Q, V, V), strict=True)
    shapes = [(B, length, *head_and_dim) for head_and_dim in dims]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, d_out):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)


def both(length, block_size, segment_BT, arrays):
    blockwise = functools.partial(
        attention, segment_BT=segment_BT, scale=SCALE, block_size=block_size
    )
    got = value_and_gradients(blockwise, *arrays)
    reference = functools.partial(naive, segment_BT=segment_BT)
    arrays = [x.astype(jnp.float32) for x in arrays]
    return got, value_and_gradients(reference, *arrays)


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_naive_softmax(case, kv_heads):
    length = CASES[case][0]
    got, want = both(*CASES[case], inputs(length, kv_heads=kv_heads))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_scores_in_the_thousands_overflow_nothing():
    q, k, v, d_out = inputs(13)
    got, want = both(13, 5, DOCUMENTS, [100 * q, 100 * k, v, d_out])
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_bfloat16_differs_from_float32_by_its_rounding():
    arrays = inputs(13, jnp.bfloat16)
    got, want = both(13, 5, DOCUMENTS, arrays)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.bfloat16
        error = abs(x.astype(np.float32) - y).max() / abs(y).max()
        assert error < 2**-6


def test_what_a_group_shares_is_not_copied_for_its_heads():
    """Keys and values are the larger part of what 64 heads and one block take."""

    def temporary_bytes(kv_heads):
        shapes = [(1, 512, heads, 64) for heads in (64, kv_heads, kv_heads)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        attend = functools.partial(
            attention, segment_BT=None, scale=SCALE, block_size=32
        )
        compiled = jax.jit(attend).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_head = 2 * 512 * 64 * 4
    assert temporary_bytes(64) - temporary_bytes(1) > 0.9 * 63 * one_head


def test_memory_of_the_gradient_grows_with_the_sequence_not_its_square():
    def gradient(q, k, v):
        def total(*qkv):
            return attention(*qkv, None, scale=SCALE, block_size=16).sum()

        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    def temporary_bytes(length):
        compiled = jax.jit(gradient).lower(*inputs(length)[:3]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(512) < 2.2 * temporary_bytes(256)
