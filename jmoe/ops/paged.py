"""A cache of what attention needs of earlier tokens, in pages, and attention to it.

A page has room for the entries of as many consecutive positions as it is long. Which
pages a sequence has, and in what order, its row of a table says: position p is entry
p % K of page table[p // K]. So sequences of any lengths share one array, and one that
has ended leaves its pages to others. What is in a page before it is written, or stays
of an earlier sequence, is never read, and may be anything, NaN too.

The softmax is computed a few pages at a time, as in `jmoe.ops.attention`.

Shapes: B sequence, Q token of this step, P page of the cache, K position in a page, M
page of a sequence, J pages read at a time, S = J * K their positions, G head of keys
and values, H head that shares one, X query/key dimension, V value dimension.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.attention import MASKED

BLOCK = 512  # positions scored at a time, but at least a page

# Of pages [B, J]: keys [B, S, G, X] and values [B, S, G, V].
Read = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Sequences(NamedTuple):
    """Equally many tokens of some sequences, and where the cache has these.

    table_BM: int32. position_BQ: int32, of each token in its sequence; below 0 there is
    no token. Those of a sequence follow each other, and those before are cached.
    """

    table_BM: jax.Array
    position_BQ: jax.Array

    @property
    def num_tokens(self) -> int:
        return self.position_BQ.size


def write(pages: jax.Array, new: jax.Array, sequences: Sequences) -> jax.Array:
    """Returns the cache with the tokens' entries at their positions.

    Args:
      pages: [P, K, ...].
      new: [B, Q, ...]; those of no token go nowhere.
    """
    table_BM, position_BQ = sequences
    size = pages.shape[1]
    index_BQ = jnp.maximum(position_BQ, 0) // size
    page_BQ = jnp.take_along_axis(table_BM, index_BQ, axis=1)
    page_BQ = jnp.where(position_BQ >= 0, page_BQ, pages.shape[0])
    entry_BQ = position_BQ % size
    return pages.at[page_BQ, entry_BQ].set(new.astype(pages.dtype), mode="drop")


def entries(pages: jax.Array, page_BJ: jax.Array) -> jax.Array:
    """Returns what is in these pages, [B, J * K, ...]."""
    found = jnp.take(pages, page_BJ, axis=0, mode="clip")
    return found.reshape(page_BJ.shape[0], -1, *pages.shape[2:])


def attend(
    q_BQGHX: jax.Array,
    sequences: Sequences,
    read: Read,
    *,
    page_size: int,
    value_dim: int,
    scale: float,
) -> jax.Array:
    """Returns each query's mean of values up to its own position, [B, Q, G, H, V].

    In q's dtype; zeros where there is no token.

    Args:
      read: what turns pages into keys and values.
      scale: multiplies the logits before the float32 softmax.
    """
    table_BM, position_BQ = sequences
    last_B = position_BQ.max(-1)
    pages = min(max(BLOCK // page_size, 1), table_BM.shape[1])
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % pages)))

    def visit(i, carry):
        out, top, total = carry
        k_BSGX, v_BSGV = read(lax.dynamic_slice_in_dim(table_BM, i * pages, pages, 1))
        position_S = i * pages * page_size + jnp.arange(k_BSGX.shape[1])
        is_there_BS = position_S <= last_B[:, None]
        v_BSGV = jnp.where(is_there_BS[..., None, None], v_BSGV, 0)
        is_seen_BQS = position_S <= position_BQ[..., None]
        is_seen_BQGHS = is_seen_BQS[:, :, None, None]
        s_BQGHS = scale * jnp.einsum(
            "bqghx,bsgx->bqghs", q_BQGHX, k_BSGX, preferred_element_type=jnp.float32
        )
        s_BQGHS = jnp.where(is_seen_BQGHS, s_BQGHS, MASKED)
        new_top = jnp.maximum(top, s_BQGHS.max(-1))
        weight_BQGHS = jnp.exp(s_BQGHS - new_top[..., None]) * is_seen_BQGHS
        shrink = jnp.exp(top - new_top)
        value = jnp.einsum(
            "bqghs,bsgv->bqghv",
            weight_BQGHS.astype(v_BSGV.dtype),
            v_BSGV,
            preferred_element_type=jnp.float32,
        )
        out = out * shrink[..., None] + value
        return out, new_top, total * shrink + weight_BQGHS.sum(-1)

    heads = q_BQGHX.shape[:-1]
    start = (
        jnp.zeros((*heads, value_dim), jnp.float32),
        jnp.full(heads, MASKED, jnp.float32),
        jnp.zeros(heads, jnp.float32),
    )
    # As many pages as the longest sequence has.
    count = (last_B.max() + pages * page_size) // (pages * page_size)
    out, _, total = lax.fori_loop(0, count, visit, start)
    total = jnp.where(total > 0, total, 1.0)
    return (out / total[..., None]).astype(q_BQGHX.dtype)
