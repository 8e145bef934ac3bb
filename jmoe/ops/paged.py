"""A cache of what attention needs of earlier tokens, in pages, and attention to it.

A page has room for the entries of as many consecutive positions as it is long. Which
pages a sequence has, and in what order, its row of a table says: position p is entry
p % K of page table[p // K]. So sequences of any lengths share one array, and one that
has ended leaves its pages to others. What is in a page before it is written, or stays
of an earlier sequence, is never read, and may be anything, NaN too.

The softmax is computed a few pages at a time, as in `jmoe.ops.attention`: in blocks of
a sequence's pages. As many blocks are computed at a time as there are sequences, but of
whichever these are: so all take as long as their blocks are many, and not as the
longest times their number.

Shapes: B sequence, Q token of this step, P page of the cache, K position in a page, M
page of a sequence, W block that is computed at a time, J page of one, S = J * K its
positions, G head of keys and values, H head that shares one, R = Q * H its queries, X
query/key dimension, V value dimension.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.attention import MASKED

BLOCK = 256  # positions scored at a time, in all, but at least a page a sequence

# Of pages [W, J], and which of their positions [W, S] are written: keys [W, G, S, X]
# and values [W, G, S, V], finite ones everywhere.
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


def entries(pages: jax.Array, page_WJ: jax.Array, is_there_WS: jax.Array) -> jax.Array:
    """Returns what is in these pages, [W, S, ...], and zeros where nothing is."""
    found = jnp.take(pages, page_WJ, axis=0, mode="clip")
    found = found.reshape(*is_there_WS.shape, *pages.shape[2:])
    is_there = is_there_WS.reshape(*is_there_WS.shape, *(1,) * (found.ndim - 2))
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
    pages = min(max(BLOCK // (batch * page_size), 1), sequences.table_BM.shape[1])
    num_blocks, find = _blocks(sequences, pages, page_size)
    q_BGRX = q_BQGHX.swapaxes(1, 2).reshape(batch, groups, -1, dim)
    position_B1R = jnp.repeat(sequences.position_BQ, heads, axis=1)[:, None]

    def visit(i, carry):
        out, top, total = carry
        b_W, page_WJ, position_WS, is_there_WS = find(i * batch + jnp.arange(batch))
        k_WGSX, v_WGSV = read(page_WJ, is_there_WS)
        s_WGRS = scale * jnp.einsum(
            "wgrx,wgsx->wgrs", q_BGRX[b_W], k_WGSX, preferred_element_type=jnp.float32
        )
        is_seen_W1RS = position_WS[:, None, None] <= position_B1R[b_W][..., None]
        s_WGRS = jnp.where(is_seen_W1RS, s_WGRS, MASKED)
        new_top = top.at[b_W].max(s_WGRS.max(-1), mode="drop")
        weight_WGRS = jnp.exp(s_WGRS - new_top[b_W][..., None])
        shrink = jnp.exp(top - new_top)
        value_WGRV = jnp.einsum(
            "wgrs,wgsv->wgrv",
            weight_WGRS.astype(v_WGSV.dtype),
            v_WGSV,
            preferred_element_type=jnp.float32,
        )
        out = (out * shrink[..., None]).at[b_W].add(value_WGRV, mode="drop")
        total = (total * shrink).at[b_W].add(weight_WGRS.sum(-1), mode="drop")
        return out, new_top, total

    rows = q_BGRX.shape[:-1]
    start = (
        jnp.zeros((*rows, value_dim), jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    count = (num_blocks + batch - 1) // batch
    out, _, total = lax.fori_loop(0, count, visit, start)
    is_there_B1R = position_B1R >= 0  # others have seen nothing
    out = jnp.where(is_there_B1R[..., None], out / total[..., None], 0)
    out = out.reshape(batch, groups, -1, heads, value_dim).swapaxes(1, 2)
    return out.astype(q_BQGHX.dtype)


def _blocks(sequences: Sequences, pages: int, page_size: int):
    """Returns how many blocks of so many pages all sequences have, and what finds some.

    That is a function of indices [W] among all, those of a sequence one after the
    other. It returns whose these are (B: no one's), their pages [W, J] and positions
    [W, S], and which of the latter are cached.
    """
    table_BM, position_BQ = sequences
    size = pages * page_size
    last_B = position_BQ.max(-1)
    count_B = (last_B + size) // size
    end_B = jnp.cumsum(count_B)

    def find(index_W):
        b_W = (index_W[:, None] >= end_B).sum(-1)
        of_own_W1 = (index_W - (end_B - count_B)[b_W])[:, None]
        page_WJ = table_BM[b_W[:, None], of_own_W1 * pages + jnp.arange(pages)]
        position_WS = of_own_W1 * size + jnp.arange(size)
        return b_W, page_WJ, position_WS, position_WS <= last_B[b_W][:, None]

    return end_B[-1], find
