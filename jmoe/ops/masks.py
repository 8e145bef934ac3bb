"""Which positions of a batch's rows are to be seen, and from which to predict.

Shapes: B sequence, T position. Leading dimensions may be more or fewer.
"""

import jax
import jax.numpy as jnp


def shift_left(x_BT: jax.Array, by: int) -> jax.Array:
    """Returns x with, at t, what stood at t + by; the last `by` positions are 0."""
    return jnp.pad(x_BT[..., by:], [(0, 0)] * (x_BT.ndim - 1) + [(0, by)])


def reaches(
    depth: int, is_real_BT: jax.Array, segment_BT: jax.Array | None = None
) -> jax.Array:
    """Returns whether the token `depth` after each position is there to be seen, bool.

    It is if it lies within the row, both tokens are real and, where attention is
    confined to documents, of the same one. From such positions the MTP module of this
    depth predicts.

    Args:
      segment_BT: int32 document of each position; None: they are not told apart.
    """
    found_BT = is_real_BT & shift_left(is_real_BT, depth)
    if segment_BT is None:
        return found_BT
    return found_BT & (segment_BT == shift_left(segment_BT, depth))
