"""ZeRO: what the axes that don't divide a parameter would hold in copies, they divide.

A parameter has *free* axes: those its own dimensions aren't divided over. Along these,
every device computes with the same weights, on other tokens. Stage 1 of ZeRO (arXiv
1910.02054, section 5) divides the float32 master weights and the optimizer's moments
over them: a step gathers the weights, in the dtype that it computes in, and leaves each
device its part of the summed gradient, which is all that its part of the optimizer
needs. Stage 3 gathers a layer's weights when the layer needs them, and again in the
backward pass.

Everything here is by parameter: a `Placement` says how one is stored and how it is
computed with, and whole trees are mapped.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax.sharding import PartitionSpec

from jmoe.config.mesh import MESH_AXES
from jmoe.parallel import collectives, rules
from jmoe.parallel.rules import LAYERS


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one parameter lies on the mesh.

    whole: its spec when it is computed with. stored: its spec at rest, where `axes`
    divide dimension `dim` besides. summed: free axes that divide nothing, as the sizes
    don't allow it; along these, parameter and optimizer state are copies.
    """

    whole: PartitionSpec
    stored: PartitionSpec
    dim: int
    axes: tuple[str, ...]
    summed: tuple[str, ...]

    def of_layer(self) -> "Placement":
        """That of one layer's parameter, where this is of a stack of layers."""
        whole, stored = (PartitionSpec(*s[1:]) for s in (self.whole, self.stored))
        return Placement(whole, stored, self.dim - 1, self.axes, self.summed)


def place(boxed: Any, shape: Mapping[str, int]) -> Any:
    """A `Placement` for every parameter.

    Args:
      boxed: Linen's boxed parameters, or their shapes.
      shape: of the mesh, devices by axis.

    Raises:
      ValueError: the rules don't fit (`rules.specs`).
    """
    return jax.tree.map(
        lambda x, dims, spec: _place(x.shape, dims, spec, shape),
        meta.unbox(boxed),
        nn.get_partition_spec(boxed),
        rules.specs(boxed, shape),
    )


def _place(
    size: tuple[int, ...],
    dims: Sequence[str | None],
    axes: PartitionSpec,
    shape: Mapping[str, int],
) -> Placement:
    # Layers of a stack stay together, so that one can be gathered alone.
    open_dims = [d for d, axis in enumerate(axes) if axis is None and dims[d] != LAYERS]
    free = tuple(a for a in MESH_AXES if a not in axes and shape[a] > 1)
    for count in range(len(free), 0, -1):
        over = free[:count]
        devices = math.prod(shape[axis] for axis in over)
        fitting = [d for d in open_dims if size[d] % devices == 0]
        if fitting:
            dim = max(fitting, key=lambda d: size[d])
            stored = PartitionSpec(*axes[:dim], over, *axes[dim + 1 :])
            return Placement(axes, stored, dim, over, free[count:])
    return Placement(axes, axes, 0, (), free)


def gather(x: jax.Array, placement: Placement) -> jax.Array:
    """The parameter as it is computed with; its transpose is `reduce`. All-gather."""
    return collectives.gather(x, placement.axes, placement.dim)


def reduce(gradient: jax.Array, placement: Placement) -> jax.Array:
    """This device's part of the gradient summed over all tokens. Reduce-scatter."""
    part = collectives.scatter_sum(gradient, placement.axes, placement.dim)
    return collectives.total(part, placement.summed)


def gather_rows(x: jax.Array, placement: Placement, index_PR: np.ndarray) -> jax.Array:
    """The rows of a stack that this rank of `pipe` computes with, [R, ...].

    What `pipe` divides besides, all its ranks have a part of: they swap parts of each
    other's rows, in an all-to-all. Its transpose is `reduce_rows`. All-gathers too.

    Args:
      index_PR: each rank's rows; below 0 where it has fewer than R, which get any.
    """
    index_PR = np.maximum(index_PR, 0)
    outer, inner = _around_pipe(placement)
    x = collectives.gather(x, inner, placement.dim)
    if "pipe" not in placement.axes:
        return x[jnp.asarray(index_PR)[collectives.axis_index("pipe")]]
    rows_PR = x[index_PR]
    rows = jax.lax.all_to_all(rows_PR, "pipe", 0, placement.dim + 1, tiled=True)[0]
    return collectives.gather(rows, outer, placement.dim)


def reduce_rows(
    gradient: jax.Array, placement: Placement, index_PR: np.ndarray, size: int
) -> jax.Array:
    """This device's part of a stack's gradient, from each rank's rows of it, [R, ...].

    Rows that several ranks have are summed. Reduce-scatters, and an all-to-all.

    Args:
      size: of the stack.
    """
    outer, inner = _around_pipe(placement)
    # Beyond the end is where rows go that are none.
    index_PR = np.where(index_PR < 0, size, index_PR)
    rows = collectives.scatter_sum(gradient, outer, placement.dim)
    if "pipe" in placement.axes:
        rows_PR = jax.lax.all_to_all(
            rows[None], "pipe", placement.dim + 1, 0, tiled=True
        )
        index = jnp.asarray(index_PR)
    else:
        rows_PR = rows
        index = jnp.asarray(index_PR)[collectives.axis_index("pipe")]
    stack = jnp.zeros((size, *rows_PR.shape[index.ndim :]), rows.dtype)
    stack = stack.at[index].add(rows_PR, mode="drop")
    part = collectives.scatter_sum(stack, inner, placement.dim)
    return collectives.total(part, placement.summed)


def _around_pipe(placement: Placement) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of a parameter outside of `pipe`, and inside."""
    if "pipe" not in placement.axes:
        return (), placement.axes
    at = placement.axes.index("pipe")
    return placement.axes[:at], placement.axes[at + 1 :]
