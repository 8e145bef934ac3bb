"""Our attention kernel for Hopper, interpreted on the CPU, against the softmax's sums.

`tokamax`'s two can't be: they use barriers and accumulators that the interpreter has
not. Nor has it products of what is in registers, which are computed as JAX would here;
that they are tensor cores' is left to the compiler (tests/hopper/test_attention.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops.kernels import attention_keys

SCALE = 0.1


def softmax(q, k, v, segment_T):
    """The output [B, T, H, V], and the log-sum-exp [B, H, T]."""
    logits = SCALE * jnp.einsum("bqhd,bkhd->bhqk", q, k)
    same_TT = segment_T[:, None] == segment_T
    logits = jnp.where(np.tril(same_TT), logits, -jnp.inf)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - log_sum[..., None])
    return jnp.einsum("bhqk,bkhv->bqhv", weights, v), log_sum


@pytest.mark.parametrize("sizes", [[256], [128, 128], [40, 1, 215]])
def test_gradients_of_keys_and_values_are_the_softmaxs(
    sizes, interpreted, product_by_jax
):
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(1, sum(sizes), 2, dim)), jnp.bfloat16)
        for dim in (128, 128, 64, 64)
    )
    segment_T = np.repeat(np.arange(len(sizes)), sizes)
    start_BT = np.repeat(np.cumsum(sizes) - sizes, sizes)[None].astype(np.int32)
    wide = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
    attend = functools.partial(softmax, segment_T=segment_T)
    out, pull, log_sum = jax.vjp(attend, *wide[:3], has_aux=True)
    delta = jnp.einsum("bthv,bthv->bht", out, wide[3])
    start = None if len(sizes) == 1 else jnp.asarray(start_BT)
    arguments = q, k, v, d_out, log_sum, delta, start
    # What is still being computed can keep the interpreter's threads from running.
    arguments, want = jax.block_until_ready((arguments, pull(wide[3])[1:]))
    got = jax.block_until_ready(attention_keys.gradients(*arguments, scale=SCALE))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.bfloat16
        error = abs(x.astype(jnp.float32) - y).max() / abs(y).max()
        assert error < 2**-6
