"""Rotary positions (arXiv 2104.09864) and their YaRN extension (arXiv 2309.00071).

Shapes: B batch, T position, H head, R rotated dimension, P = R / 2 pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config.attention import YarnConfig, yarn_mscale


def inverse_frequencies(
    rope_dim: int, theta: float, yarn: YarnConfig | None
) -> np.ndarray:
    """Returns radians a position for each pair, float32 [P].

    YaRN (section 3.2) divides by `factor` the frequencies that turn fewer than
    `beta_slow` times over the original context, leaves those that turn more than
    `beta_fast` times, and ramps linearly between the two.
    """
    plain_P = theta ** -(np.arange(0, rope_dim, 2, dtype=np.float32) / rope_dim)
    if yarn is None:
        return plain_P

    def pair_that_turns(times: float) -> float:
        period = yarn.original_positions / (times * 2 * math.pi)
        return rope_dim * math.log(period) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), rope_dim - 1)
    span = high - low or 0.001  # DeepSeek's guard for a ramp of no width
    ramp_P = np.clip((np.arange(rope_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    return (plain_P / yarn.factor * ramp_P + plain_P * (1 - ramp_P)).astype(np.float32)


def amplitude(yarn: YarnConfig | None) -> float:
    """Returns what YaRN multiplies cos and sin with; 1 if the softmax scale has it."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(
            yarn.factor, yarn.mscale_all_dim
        )
    return yarn_mscale(yarn.factor, 1.0)


def rotation(
    position_BT: jax.Array, rope_dim: int, theta: float, yarn: YarnConfig | None
) -> tuple[jax.Array, jax.Array]:
    """Returns float32 cos and sin of every position's angles, each [..., P]."""
    frequency_P = inverse_frequencies(rope_dim, theta, yarn)
    angle_BTP = position_BT[..., None].astype(jnp.float32) * frequency_P
    scale = amplitude(yarn)
    return jnp.cos(angle_BTP) * scale, jnp.sin(angle_BTP) * scale


def rotate_interleaved(
    x_BTHR: jax.Array, cos_BTP: jax.Array, sin_BTP: jax.Array
) -> jax.Array:
    """Returns x with its pairs (0, 1), (2, 3), ... rotated; float32 inside.

    The rotated pairs come back as halves (all firsts, then all seconds): a fixed
    permutation that queries and keys share, so their products don't see it.
    """
    x32 = x_BTHR.astype(jnp.float32)
    return _turned(x32[..., 0::2], x32[..., 1::2], cos_BTP, sin_BTP, x_BTHR.dtype)


def rotate_halves(
    x_BTHR: jax.Array, cos_BTP: jax.Array, sin_BTP: jax.Array
) -> jax.Array:
    """Returns x with its pairs (0, P), (1, P + 1), ... rotated; float32 inside."""
    first, second = jnp.split(x_BTHR.astype(jnp.float32), 2, axis=-1)
    return _turned(first, second, cos_BTP, sin_BTP, x_BTHR.dtype)


# By which dimensions are a pair.
ROTATIONS = {"interleaved": rotate_interleaved, "halves": rotate_halves}


def _turned(first, second, cos_BTP, sin_BTP, dtype):
    """Rotates pairs, and returns them as halves."""
    cos, sin = cos_BTP[:, :, None], sin_BTP[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(dtype)
