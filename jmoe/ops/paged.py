"""A cache of what attention needs of earlier tokens, in pages, and attention to it.

A page has room for the entries of as many consecutive positions as it is long. Which
pages a sequence has, and in what order, its row of a table says: position p is entry
p % K of page table[p // K]. So sequences of any lengths share one array, and one that
has ended leaves its pages to others. What is in a page before it is written, or stays
of an earlier sequence, is never read, and may be anything, NaN too.

The softmax is computed a few pages at a time, as in `jmoe.ops.attention`.

Shapes: B sequence, Q token of this step, P page of the cache, K position in a page, M
page of a sequence, J pages read at a time, S = J * K their positions, G head of keys
and values, H head that shares one, R = Q * H its queries, X query/key dimension, V
value dimension.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.attention import MASKED

BLOCK = 256  # positions of all sequences scored at a time, but at least a page of each

# Of pages [B, J], and which of their positions [B, S] are written: keys [B, G, S, X]
# and values [B, G, S, V], finite ones everywhere.
Read = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


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


def entries(pages: jax.Array, page_BJ: jax.Array, is_there_BS: jax.Array) -> jax.Array:
    """Returns what is in these pages, [B, S, ...], and zeros where nothing is."""
    found = jnp.take(pages, page_BJ, axis=0, mode="clip")
    found = found.reshape(*is_there_BS.shape, *pages.shape[2:])
    is_there = is_there_BS.reshape(*is_there_BS.shape, *(1,) * (found.ndim - 2))
    return jnp.where(is_there, found, 0)


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
      read: what turns pages into keys and values (`Read`).
      scale: multiplies the logits before the float32 softmax.
    """
    batch, _, groups, heads, dim = q_BQGHX.shape
    table_BM, position_BQ = sequences
    last_B = position_BQ.max(-1)
    pages = min(max(BLOCK // (batch * page_size), 1), table_BM.shape[1])
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % pages)))
    q_BGRX = q_BQGHX.swapaxes(1, 2).reshape(batch, groups, -1, dim)
    position_B1R = jnp.repeat(position_BQ, heads, axis=1)[:, None]

    def visit(i, carry):
        out, top, total = carry
        page_BJ = lax.dynamic_slice_in_dim(table_BM, i * pages, pages, 1)
        position_S = i * pages * page_size + jnp.arange(pages * page_size)
        k_BGSX, v_BGSV = read(page_BJ, position_S <= last_B[:, None])
        s_BGRS = scale * jnp.einsum(
            "bgrx,bgsx->bgrs", q_BGRX, k_BGSX, preferred_element_type=jnp.float32
        )
        s_BGRS = jnp.where(position_S <= position_B1R[..., None], s_BGRS, MASKED)
        new_top = jnp.maximum(top, s_BGRS.max(-1))
        weight_BGRS = jnp.exp(s_BGRS - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        value = jnp.einsum(
            "bgrs,bgsv->bgrv",
            weight_BGRS.astype(v_BGSV.dtype),
            v_BGSV,
            preferred_element_type=jnp.float32,
        )
        out = out * shrink[..., None] + value
        return out, new_top, total * shrink + weight_BGRS.sum(-1)

    rows = q_BGRX.shape[:-1]
    start = (
        jnp.zeros((*rows, value_dim), jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    # As many pages as the longest sequence has.
    count = (last_B.max() + pages * page_size) // (pages * page_size)
    out, _, total = lax.fori_loop(0, count, visit, start)
    is_there_B1R = position_B1R >= 0  # others have seen nothing
    out = jnp.where(is_there_B1R[..., None], out / total[..., None], 0)
    out = out.reshape(batch, groups, -1, heads, value_dim).swapaxes(1, 2)
    return out.astype(q_BQGHX.dtype)
