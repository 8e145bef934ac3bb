"""Collectives of a program that is written once, for one device or for a mesh.

Inside `jax.shard_map` over the mesh, a function sees its device's part of every array;
outside, whole arrays. These functions ask which it is: over an axis that isn't there,
or has one device, they return what they were given.

Gradients are taken inside `shard_map`, of the device's own share of the loss; the loss
is the sum of the shares. So what sums over devices must be linear and have the other
device's gradient as its transpose: `gather` and `scatter_sum` are each other's
transposes, and are all that a model's activations go through. `total` is for what has
no gradient.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

Axes = str | Sequence[str]


def axis_size(axes: Axes) -> int:
    """How many devices share the work along `axes`; 1 outside of `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1
    for axis in _present(axes):
        size *= mesh.shape[axis]
    return size


def axis_index(axis: str) -> jax.Array | int:
    """This device's place along `axis`."""
    return lax.axis_index(axis) if _present(axis) else 0


def share(size: int, axis: str, what: str) -> int:
    """What one device of `axis` has of `size` things; `what` names them in an error."""
    devices = axis_size(axis)
    if size % devices:
        raise ValueError(f"{what}={size} must divide over {axis}={devices} devices.")
    return size // devices


def gather(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """All devices' parts of `x`, joined along `dim`. An all-gather."""
    axes = _present(axes)
    return lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def scatter_sum(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """This device's part, along `dim`, of the sum of all devices' x. Reduce-scatter."""
    axes = _present(axes)
    if not axes:
        return x
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def part(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """This device's part, along `dim`, of an array that all devices of `axis` have."""
    if not _present(axis):
        return x
    size = share(x.shape[dim], axis, f"dimension {dim}")
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, dim)


def total(x: Any, axes: Axes) -> Any:
    """The sum over devices of each leaf, which takes no gradient. An all-reduce."""
    axes = _present(axes)
    return lax.psum(jax.tree.map(lax.stop_gradient, x), axes) if axes else x


def largest(x: jax.Array, axes: Axes) -> jax.Array:
    """The maximum over devices, which takes no gradient. An all-reduce."""
    axes = _present(axes)
    return lax.pmax(lax.stop_gradient(x), axes) if axes else x


def swap(x_P: jax.Array, axis: str) -> jax.Array:
    """Row p goes to device p of `axis`, and comes from it. An all-to-all."""
    return lax.all_to_all(x_P, axis, 0, 0) if _present(axis) else x_P


def all_to_all(x: jax.Array, axes: Axes, split_dim: int, join_dim: int) -> jax.Array:
    """Piece i of `x`, along `split_dim`, goes to device i; those that come are joined.

    With the two dimensions exchanged it is its own inverse. An all-to-all.
    """
    axes = _present(axes)
    return lax.all_to_all(x, axes, split_dim, join_dim, tiled=True) if axes else x


def _present(axes: Axes) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    names = (axes,) if isinstance(axes, str) else axes
    return tuple(a for a in names if a in mesh.manual_axes and mesh.shape[a] > 1)
