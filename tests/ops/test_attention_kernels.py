"""Attention's kernels for Hopper, interpreted on the CPU, against the softmax's sums.

The interpreter has no products of what is in registers, which are computed as JAX would
here; that they are tensor cores' is left to the compiler
(tests/hopper/test_attention.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops.kernels import attention_keys, attention_queries, tensor_cores

SCALE = 0.1


def softmax(q, k, v, segment_T):
    """The output [B, T, H, V], and the log-sum-exp [B, H, T]."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = SCALE * jnp.einsum("bqhd,bkhd->bhqk", q, k)
    same_TT = segment_T[:, None] == segment_T
    logits = jnp.where(np.tril(same_TT), logits, -jnp.inf)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - log_sum[..., None])
    return jnp.einsum("bhqk,bkhv->bqhv", weights, v), log_sum


@pytest.fixture
def products_by_jax(product_by_jax, monkeypatch):
    def products(first, second, meanwhile):
        made = meanwhile(tensor_cores.product(*first))
        return tensor_cores.product(*second), made

    monkeypatch.setattr(tensor_cores, "products", products)


class Case(NamedTuple):
    """Operands, and what is to come of them."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    log_sum: jax.Array
    delta: jax.Array
    start: jax.Array | None
    out: jax.Array
    gradients: tuple[jax.Array, ...]  # of q, k and v


def case(sizes, dims, kv_heads=2) -> Case:
    """Returns a case of documents of these sizes, which fill a row."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(1, sum(sizes), heads, dim)), jnp.bfloat16)
        for heads, dim in [
            (2, dims[0]),
            (kv_heads, dims[0]),
            (kv_heads, dims[1]),
            (2, dims[1]),
        ]
    )
    segment_T = np.repeat(np.arange(len(sizes)), sizes)
    start_BT = np.repeat(np.cumsum(sizes) - sizes, sizes)[None].astype(np.int32)
    wide = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
    attend = functools.partial(softmax, segment_T=segment_T)
    out, pull, log_sum = jax.vjp(attend, *wide[:3], has_aux=True)
    delta = jnp.einsum("bthv,bthv->bht", out, wide[3])
    start = None if len(sizes) == 1 else jnp.asarray(start_BT)
    result = Case(q, k, v, d_out, log_sum, delta, start, out, pull(wide[3]))
    # What is still being computed can keep the interpreter's threads from running.
    return jax.block_until_ready(result)


def assert_close(got, want):
    assert got.dtype == jnp.bfloat16
    error = abs(got.astype(jnp.float32) - want).max() / abs(want).max()
    assert error < 2**-6


SIZES = [[256], [128, 128], [40, 1, 215]]


@pytest.mark.parametrize("dims", [(128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, [300, 84]], ids=str)
def test_the_output_and_its_log_sum_are_the_softmaxs(
    sizes, dims, interpreted, products_by_jax
):
    x = case(sizes, dims)
    got = attention_queries.forward(x.q, x.k, x.v, x.start, scale=SCALE)
    out, log_sum = jax.block_until_ready(got)
    assert_close(out, x.out)
    np.testing.assert_allclose(log_sum, x.log_sum, rtol=0, atol=1e-5)


def test_heads_that_share_keys_have_the_softmaxs_output(interpreted, products_by_jax):
    x = case([40, 216], (64, 64), kv_heads=1)
    got = attention_queries.forward(x.q, x.k, x.v, x.start, scale=SCALE)
    out, log_sum = jax.block_until_ready(got)
    assert_close(out, x.out)
    np.testing.assert_allclose(log_sum, x.log_sum, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "kv_heads"), [*((sizes, 2) for sizes in SIZES), ([40, 216], 1)], ids=str
)
def test_gradients_are_the_softmaxs(sizes, kv_heads, interpreted, product_by_jax):
    *operands, _, wanted = case(sizes, (128, 64), kv_heads)
    dq = jax.block_until_ready(attention_queries.gradient(*operands, scale=SCALE))
    of_keys = attention_keys.gradients(*operands, scale=SCALE)
    for got, want in zip((dq, *jax.block_until_ready(of_keys)), wanted, strict=True):
        assert_close(got, want)
