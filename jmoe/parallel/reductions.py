"""How what parts have measured becomes what the whole has: one rule for all parts.

Parts are microbatches, devices, and a pipeline's ranks; a measurement is a tree. An
array in it is a sum, exact if it is of integers. `Max` is a maximum. Whoever measures
says so by the type, and loops, meshes and schedules need not know what was measured.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jmoe.parallel import collectives


@struct.dataclass
class Max:
    """A floating-point maximum; -inf of nothing."""

    value: Any


def merge(first: Any, second: Any) -> Any:
    """Returns what two parts have measured together, in the first one's dtypes."""
    return _map(
        lambda x, y: x + y.astype(x.dtype),
        lambda x, y: jnp.maximum(x, y.astype(x.dtype)),
        first,
        second,
    )


def nothing(tree: Any, lead: tuple[int, ...] = ()) -> Any:
    """Returns what no part measures, of a tree's shapes behind dimensions `lead`."""
    return _map(
        lambda x: jnp.zeros((*lead, *x.shape), x.dtype),
        lambda x: jnp.full((*lead, *x.shape), -jnp.inf, x.dtype),
        tree,
    )


def along(tree: Any, dim: int = 0) -> Any:
    """Returns what the parts along a dimension have measured together."""
    return _map(lambda x: x.sum(dim), lambda x: x.max(dim), tree)


def place(tree: Any, index_R: jax.Array, size: int) -> Any:
    """Returns an array of `size` rows for each of R, which go to these indices.

    What goes beyond the end is left out; what goes to one row is merged.
    """

    def sums(x_R: jax.Array) -> jax.Array:
        zeros = jnp.zeros((size, *x_R.shape[1:]), x_R.dtype)
        return zeros.at[index_R].add(x_R, mode="drop")

    def maxima(x_R: jax.Array) -> jax.Array:
        least = jnp.full((size, *x_R.shape[1:]), -jnp.inf, x_R.dtype)
        return least.at[index_R].max(x_R, mode="drop")

    return _map(sums, maxima, tree)


def over_devices(tree: Any, axes: collectives.Axes) -> Any:
    """Returns what all devices of the axes have measured together. All-reduces."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_max)
    sums = collectives.psum([x for x in leaves if not _is_max(x)], axes)
    rest = iter(sums)
    return jax.tree.unflatten(
        structure,
        [
            Max(collectives.pmax(x.value, axes)) if _is_max(x) else next(rest)
            for x in leaves
        ],
    )


def values(tree: Any) -> Any:
    """Returns the tree with plain arrays for maxima too."""
    return jax.tree.map(lambda x: x.value if _is_max(x) else x, tree, is_leaf=_is_max)


def _map(sums: Callable[..., Any], maxima: Callable[..., Any], *trees: Any) -> Any:
    def leaf(x: Any, *others: Any) -> Any:
        if _is_max(x):
            return Max(maxima(x.value, *(other.value for other in others)))
        return sums(x, *others)

    return jax.tree.map(leaf, *trees, is_leaf=_is_max)


def _is_max(x: Any) -> bool:
    return isinstance(x, Max)
