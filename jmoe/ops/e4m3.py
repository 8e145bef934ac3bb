"""The numbers of e4m3: 4 bits of exponent, 3 after the leading one, no infinity.

Conversions take float32 of at most 448, but for a rounding; NaN stays NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0  # there is no infinity; converting 465 gives NaN
SMALLEST_NORMAL = 2.0**-6
SMALLEST_STEP = 2.0**-9  # between subnormal numbers
MANTISSA_BITS = 3
MANTISSA_CUT = 23 - MANTISSA_BITS  # bits of float32's


def convert(x: jax.Array) -> jax.Array:
    """To e4m3: the nearest number, of two the even one."""
    return lax.platform_dependent(
        x, cuda=lambda x: x.astype(DTYPE), default=_convert_by_bits
    )


def _convert_by_bits(x: jax.Array) -> jax.Array:
    """As XLA for CPUs does, in 0.4 of its time."""
    x = nearest(x)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    # e4m3 has the last 4 of float32's 8 bits of exponent, whose bias is 120 larger.
    code = ((bits & 0x7FFFFFFF) >> MANTISSA_CUT) - (120 << MANTISSA_BITS)
    steps = (jnp.abs(x) / SMALLEST_STEP).astype(jnp.int32)
    code = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, steps, jnp.minimum(code, 0x7F))
    code |= (bits >> 24) & 0x80
    return lax.bitcast_convert_type(code.astype(jnp.uint8), DTYPE)


def nearest(x: jax.Array) -> jax.Array:
    """The number of e4m3 nearest to x, of two the even one, in float32."""
    normal = lax.reduce_precision(x, 8, MANTISSA_BITS)
    # Next to this number, float32 has e4m3's smallest steps. Counted by bits, as XLA
    # takes (x + large) - large to be x.
    large = np.float32(1.5 * 2**23 * SMALLEST_STEP)
    steps = lax.bitcast_convert_type(x + large, jnp.int32) - large.view(np.int32)
    subnormal = jnp.copysign(steps.astype(jnp.float32) * SMALLEST_STEP, x)
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, subnormal, normal)
