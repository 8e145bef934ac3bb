"""Collectives of a program that is written once, for one device or for a mesh.

Inside `jax.shard_map` over the mesh, a function sees its device's part of every array;
outside, whole arrays. These functions ask which it is: over an axis that isn't there,
or has one device, they return what they were given.

Gradients are taken inside `shard_map`, of the device's own share of the loss; the loss
is the sum of the shares. So what sums over devices must be linear and have the other
device's gradient as its transpose: `all_gather` and `reduce_scatter` are each
other's transposes, and are all that a model's activations go through. `psum` and `pmax`
are for what has no gradient.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

Axes = str | Sequence[str]


def axis_size(axes: Axes) -> int:
    """Returns how many devices share the work along `axes`; 1 outside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1
    for axis in _present(axes):
        size *= mesh.shape[axis]
    return size


def axis_index(axes: Axes) -> jax.Array | int:
    """Returns this device's place along `axes`, of which the last is the innermost."""
    axes = _present(axes)
    return lax.axis_index(axes) if axes else 0


def platform() -> str:
    """Returns what a program is traced for, such as "cpu", which needn't be here."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def share(size: int, axis: str, what: str) -> int:
    """Returns how many of `size` things one device of `axis` has.

    Args:
      what: names them in an error.

    Raises:
      ValueError: they don't divide evenly.
    """
    devices = axis_size(axis)
    if size % devices:
        raise ValueError(f"{what}={size} must divide over {axis}={devices} devices.")
    return size // devices


def all_gather(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Returns all devices' parts of `x`, joined along `dim`."""
    axes = _present(axes)
    return lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def reduce_scatter(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Returns this device's part, along `dim`, of the sum of all devices' x."""
    axes = _present(axes)
    if not axes:
        return x
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def local_part(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Returns this device's part, along `dim`, of what all devices of `axis` have."""
    if not _present(axis):
        return x
    size = share(x.shape[dim], axis, f"dimension {dim}")
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, dim)


def psum(x: Any, axes: Axes) -> Any:
    """Returns the sum over devices of each leaf, which takes no gradient."""
    axes = _present(axes)
    return lax.psum(jax.tree.map(lax.stop_gradient, x), axes) if axes else x


def pmax(x: jax.Array, axes: Axes) -> jax.Array:
    """Returns the maximum over devices, which takes no gradient."""
    axes = _present(axes)
    return lax.pmax(lax.stop_gradient(x), axes) if axes else x


def all_to_all(x: jax.Array, axes: Axes, split_dim: int, join_dim: int) -> jax.Array:
    """Sends piece i of `x`, along `split_dim`, to device i, and joins those that come.

    With the two dimensions exchanged it is its own inverse.
    """
    axes = _present(axes)
    return lax.all_to_all(x, axes, split_dim, join_dim, tiled=True) if axes else x


def ppermute(x: jax.Array, axis: str) -> jax.Array:
    """Returns the x of the device before this one along `axis`; the first has zeros."""
    if not _present(axis):
        return x
    ranks = range(axis_size(axis))
    return lax.ppermute(x, axis, list(zip(ranks, ranks[1:], strict=False)))


def _present(axes: Axes) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    names = (axes,) if isinstance(axes, str) else axes
    return tuple(a for a in names if a in mesh.manual_axes and mesh.shape[a] > 1)
