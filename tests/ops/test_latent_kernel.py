"""The kernel for decoding from latents, interpreted on the CPU, against the reference.

The interpreter has no products of what is in registers: they are computed as JAX would
here. That they are tensor cores' is left to the compiler (tests/hopper). Pages are in
any order, and NaN where no sequence has written.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import latent_attention
from jmoe.ops.kernels import latent_decode
from tests import caches


def inputs(heads, length_B):
    rng = np.random.default_rng(0)
    q_BHX = rng.normal(size=(len(length_B), heads, 192))
    cache_BSX = rng.normal(size=(len(length_B), max(length_B), 192))
    pages_PKX, table_BM = caches.scatter(cache_BSX, length_B, latent_decode.POSITIONS)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q_BHX, pages_PKX)]
    return *arrays, jnp.asarray(table_BM), jnp.asarray(length_B, jnp.int32)


@pytest.mark.parametrize(
    ("heads", "length_B", "parts"),
    [
        (64, [128, 64], 1),
        (3, [100, 0, 65], 2),
        (20, [50], 1),
        (70, [1, 193], 3),
        (16, [130], 5),  # of which two have nothing
    ],
)
def test_parts_of_sequences_give_the_references_attention(
    heads, length_B, parts, interpreted, product_by_jax, monkeypatch
):
    arrays = jax.block_until_ready(inputs(heads, length_B))
    q_BHX, pages_PKX, table_BM, lengths = arrays
    sizes = {"value_dim": 128, "scale": 0.1}
    position_BQ = lengths[:, None] - 1
    want = latent_attention._reference(
        q_BHX[:, None], pages_PKX, table_BM, position_BQ, **sizes
    )
    want = np.asarray(want[:, 0], np.float32)
    monkeypatch.setattr(latent_decode, "num_parts", lambda *_: parts)
    decode = functools.partial(latent_decode.latent_decode.__wrapped__, **sizes)
    got = decode(*arrays)
    assert got.dtype == jnp.bfloat16 and got.shape == want.shape
    np.testing.assert_allclose(got.astype(np.float32), want, atol=2**-7, rtol=2**-7)


def test_few_sequences_are_cut_and_many_are_not():
    assert latent_decode.num_parts(1, 1) == 1
    assert latent_decode.num_parts(1, 64) > 8
    assert latent_decode.num_parts(2 * latent_decode.SMS, 64) == 1
    for sequences in (1, 3, 20, 131, 200):
        for steps in (1, 2, 7, 512):
            assert 1 <= latent_decode.num_parts(sequences, steps) <= steps
