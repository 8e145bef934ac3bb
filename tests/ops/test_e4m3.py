"""Conversions to e4m3 against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.ops import e4m3


def test_every_number_is_converted_as_xla_does():
    small = np.arange(-(2**12), 2**12) * 2.0**-12 * e4m3.SMALLEST_NORMAL  # ties as well
    large = np.exp2(np.linspace(-11, np.log2(448), 100_001))
    x = np.concatenate([small, large, -large, [448, np.nan, 0.0, -0.0]])
    x = jnp.asarray(x, jnp.float32)
    want = x.astype(e4m3.DTYPE)
    got = jax.jit(e4m3.convert)(x)
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    nearest = np.asarray(jax.jit(e4m3.nearest)(x))
    assert nearest.tobytes() == np.asarray(want, np.float32).tobytes()
