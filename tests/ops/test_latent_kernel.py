"""The kernel for decoding from latents, interpreted on the CPU, against the reference.

The interpreter has no products of what is in registers: they are computed as JAX would
here. That they are tensor cores' is left to the compiler (tests/hopper).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import latent_attention
from jmoe.ops.kernels import latent_decode


def inputs(heads, positions, length_B):
    rng = np.random.default_rng(0)
    shapes = (len(length_B), heads, 192), (len(length_B), positions, 192)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    return *arrays, jnp.asarray(length_B, jnp.int32)


@pytest.mark.parametrize(
    ("heads", "positions", "length_B", "parts"),
    [
        (64, 128, [128, 64], 1),
        (3, 100, [100, 0, 65], 2),
        (20, 64, [50], 1),
        (70, 200, [1, 193], 3),
        (16, 300, [130], 5),  # of which two have nothing
    ],
)
def test_parts_of_sequences_give_the_references_attention(
    heads, positions, length_B, parts, interpreted, product_by_jax, monkeypatch
):
    arrays = jax.block_until_ready(inputs(heads, positions, length_B))
    sizes = {"value_dim": 128, "scale": 0.1}
    want = latent_attention._reference(*arrays, **sizes)
    want = np.asarray(want, np.float32)
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
