"""Number formats of few bits: a sign, an exponent, a mantissa after a leading one.

    e4m3   4 bits of exponent, 3 of mantissa; no infinity
    e5m6   5 bits of exponent, 6 of mantissa; infinity and NaN as IEEE's formats

DeepSeek-V3 multiplies in e4m3, and keeps the inputs of the linear layer after attention
in e5m6 (arXiv 2412.19437, section 3.3). There is no dtype of the latter: its numbers,
times a power of two, are numbers of bfloat16, which has 7 bits of mantissa.

Conversions take float32 that is at most a format's largest number, but for a rounding,
and NaN, which stays NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Format(NamedTuple):
    """A format's numbers.

    smallest_scale: of a block's scales. No block of zeros has a scale of zero, and what
    e5m6's smallest step is multiplied with leaves it a normal number of bfloat16.
    """

    mantissa_bits: int
    smallest_normal: float
    largest: float
    smallest_scale: float

    @property
    def smallest_step(self) -> float:
        """The difference of neighbouring subnormal numbers."""
        return self.smallest_normal * 2.0**-self.mantissa_bits


E4M3 = Format(3, 2.0**-6, 448.0, smallest_scale=2.0**-126)
E5M6 = Format(6, 2.0**-14, 65_024.0, smallest_scale=2.0**-106)

E4M3_DTYPE = jnp.float8_e4m3fn  # converting 465 gives NaN


def nearest(x: jax.Array, format: Format) -> jax.Array:
    """Returns the format's number nearest to x, of two the even one, in float32."""
    normal = lax.reduce_precision(x, 8, format.mantissa_bits)
    # Next to this number, float32 has the format's smallest steps. Counted by bits, as
    # XLA takes (x + large) - large to be x.
    large = np.float32(1.5 * 2**23 * format.smallest_step)
    steps = lax.bitcast_convert_type(x + large, jnp.int32) - large.view(np.int32)
    subnormal = jnp.copysign(steps.astype(jnp.float32) * format.smallest_step, x)
    return jnp.where(jnp.abs(x) < format.smallest_normal, subnormal, normal)


def to_e4m3(x: jax.Array) -> jax.Array:
    """Returns the number of e4m3 nearest to x, of two the even one."""
    return lax.platform_dependent(
        x, cuda=lambda x: x.astype(E4M3_DTYPE), default=_to_e4m3_by_bits
    )


def _to_e4m3_by_bits(x: jax.Array) -> jax.Array:
    """Converts as XLA for CPUs does, in 0.4 of its time."""
    x = nearest(x, E4M3)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    cut = 23 - E4M3.mantissa_bits  # bits of float32's mantissa
    # e4m3 has the last 4 of float32's 8 bits of exponent, whose bias is 120 larger.
    code = ((bits & 0x7FFFFFFF) >> cut) - (120 << E4M3.mantissa_bits)
    steps = (jnp.abs(x) / E4M3.smallest_step).astype(jnp.int32)
    is_subnormal = jnp.abs(x) < E4M3.smallest_normal
    code = jnp.where(is_subnormal, steps, jnp.minimum(code, 0x7F))
    code |= (bits >> 24) & 0x80
    return lax.bitcast_convert_type(code.astype(jnp.uint8), E4M3_DTYPE)
