"""How attention remembers: a decoder's tokens, and the cache of those before them.

A decoder computes the tokens of many sequences at once, as if they were one sequence of
T positions: so layers that know no positions need not know of it. Attention is told in
which groups they are (`ops.paged.Sequences`), first to last, and what the cache has of
each sequence lies in pages. A group's sequences have equally many tokens; those behind
the last group are there to make T divide over a mesh, and attend to nothing.

A module's pages are in its variables' collection `cache`, in which it also leaves them
with the new tokens' entries. What it computes of its parameters alone a decoder may
compute once, and hand it in the collection `prepared`.

Shapes: T token of a step, B sequence of a group, Q token of one, P page, K position in
a page.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.ops import paged

COLLECTION = "cache"
PREPARED = "prepared"

Groups = tuple[paged.Sequences, ...]


def remember(
    module: nn.Module, new: Mapping[str, jax.Array], groups: Groups
) -> dict[str, jax.Array]:
    """Returns the module's pages [P, K, ...], with the tokens' entries [1, T, ...]."""
    found = {}
    for name, entry_1TX in new.items():
        pages = module.get_variable(COLLECTION, name)
        for sequences, part in zip(groups, split(entry_1TX, groups), strict=True):
            pages = paged.write(pages, part, sequences)
        module.put_variable(COLLECTION, name, pages)
        found[name] = pages
    return found


def by_group(
    attend: Callable[[paged.Sequences, jax.Array], jax.Array],
    groups: Groups,
    q_1THX: jax.Array,
) -> jax.Array:
    """Returns [1, T, H, V] of what `attend` makes of each group's [B, Q, H, X]."""
    parts = zip(groups, split(q_1THX, groups), strict=True)
    out = [attend(sequences, q) for sequences, q in parts]
    out = jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in out])
    missing = q_1THX.shape[1] - len(out)
    return jnp.pad(out, ((0, missing), (0, 0), (0, 0)))[None]


def split(x_1TX: jax.Array, groups: Groups) -> list[jax.Array]:
    """Returns each group's tokens of all, [B, Q, ...]."""
    found, start = [], 0
    for sequences in groups:
        end = start + sequences.num_tokens
        part = x_1TX[0, start:end]
        found.append(part.reshape(*sequences.position_BQ.shape, *part.shape[1:]))
        start = end
    return found
