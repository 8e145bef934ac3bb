"""Reading and writing trees of arrays at an index that is known when it runs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def within(i: Any, tree: Any) -> Any:
    """Returns the arrays, as known in turn `i` of a loop only.

    Compilers compute ahead of a loop what is the same in all its turns, even if there
    are none; and most of a pipeline's loops have none in most ticks.
    """
    return lax.optimization_barrier((i, tree))[1]


def pick(tree: Any, index: Any) -> Any:
    """Returns one row of each array."""
    return jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree
    )


def put(tree: Any, values: Any, index: Any) -> Any:
    """Returns the arrays with one row of each replaced."""
    return jax.tree.map(
        lambda x, value: lax.dynamic_update_index_in_dim(x, value, index, 0),
        tree,
        values,
    )


def zeros(tree: Any, dtype: Any = None) -> Any:
    """Returns zeros of the same shapes, and dtypes unless given."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), tree)


def add(total: Any, part: Any) -> Any:
    return jax.tree.map(lambda t, p: t + p.astype(t.dtype), total, part)


def add_at(total: Any, part: Any, index: Any) -> Any:
    """Adds `part` to one row of each array."""
    return put(total, add(pick(total, index), part), index)


def read(stash: list[jax.Array], slot: Any, layer: Any) -> list[jax.Array]:
    """Returns what arrays [slot, layer, ...] have there."""

    def one(x: jax.Array) -> jax.Array:
        corner = (slot, layer, *(0,) * (x.ndim - 2))
        found = lax.dynamic_slice(x, corner, (1, 1, *x.shape[2:]))
        return found.reshape(x.shape[2:])

    return [one(x) for x in stash]


def write(
    stash: list[jax.Array], values: list[jax.Array], slot: Any, layer: Any
) -> list[jax.Array]:
    """Returns the arrays [slot, layer, ...] with these values there."""

    def one(x: jax.Array, value: jax.Array) -> jax.Array:
        corner = (slot, layer, *(0,) * (x.ndim - 2))
        return lax.dynamic_update_slice(x, value[None, None], corner)

    return [one(x, value) for x, value in zip(stash, values, strict=True)]
