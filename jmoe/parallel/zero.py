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
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jmoe.config.mesh import MESH_AXES
from jmoe.parallel import collectives


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


def place(shapes: Any, specs: Any, shape: Mapping[str, int]) -> Any:
    """A `Placement` for every parameter.

    Args:
      shapes, specs: trees of arrays (or their shapes) and of `rules.specs`.
      shape: of the mesh, devices by axis.
    """
    return jax.tree.map(lambda x, s: _place(x.shape, s, shape), shapes, specs)


def _place(
    size: tuple[int, ...], spec: PartitionSpec, shape: Mapping[str, int]
) -> Placement:
    axes = (*spec, *(None,) * (len(size) - len(spec)))
    free = tuple(a for a in MESH_AXES if a not in axes and shape[a] > 1)
    for count in range(len(free), 0, -1):
        over = free[:count]
        devices = math.prod(shape[axis] for axis in over)
        dim = _divisible_dim(size, axes, devices)
        if dim is not None:
            stored = PartitionSpec(*axes[:dim], over, *axes[dim + 1 :])
            return Placement(spec, stored, dim, over, free[count:])
    return Placement(spec, spec, 0, (), free)


def _divisible_dim(
    size: tuple[int, ...], axes: tuple[Any, ...], devices: int
) -> int | None:
    """The largest undivided dimension that `devices` divide.

    The layers of a stack, its first dimension, stay together, so that one can be
    gathered alone.
    """
    dims = range(1 if len(size) > 1 else 0, len(size))
    fitting = [d for d in dims if axes[d] is None and size[d] % devices == 0]
    return max(fitting, key=lambda d: size[d], default=None)


def gather(x: jax.Array, placement: Placement) -> jax.Array:
    """The parameter as it is computed with; its transpose is `reduce`. All-gather."""
    return collectives.gather(x, placement.axes, placement.dim)


def reduce(gradient: jax.Array, placement: Placement) -> jax.Array:
    """This device's part of the gradient summed over all tokens. Reduce-scatter."""
    part = collectives.scatter_sum(gradient, placement.axes, placement.dim)
    return collectives.total(part, placement.summed)
