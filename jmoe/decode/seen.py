"""Which tokens have occurred in the sequence of each slot, for repetition penalties.

Shapes: X slot, V vocabulary (this device's part), B and A sequences, Q and C their
tokens.
"""

import jax
import jax.numpy as jnp

from jmoe.decode.batch import PrefillChunks
from jmoe.parallel import collectives
from jmoe.parallel.vocabulary import AXIS


def read(seen_XV: jax.Array, chunks: PrefillChunks) -> jax.Array:
    """Returns what slots have seen, of new sequences only what is read now."""
    new_A = jnp.where(chunks.start_A > 0, len(seen_XV), chunks.slot_A)
    seen_XV = seen_XV.at[new_A].set(False, mode="drop")
    is_there_AC = jnp.arange(chunks.token_AC.shape[1]) < chunks.count_A[:, None]
    return note(seen_XV, chunks.slot_A, chunks.token_AC, is_there_AC)


def note(
    seen_XV: jax.Array, slot_B: jax.Array, token_BQ: jax.Array, is_there_BQ: jax.Array
) -> jax.Array:
    """Returns what slots have seen, with those tokens that are there."""
    size = seen_XV.shape[1]
    own_BQ = token_BQ - collectives.axis_index(AXIS) * size
    own_BQ = jnp.where(is_there_BQ & (own_BQ >= 0), own_BQ, size)
    return seen_XV.at[slot_B[:, None], own_BQ].set(True, mode="drop")
