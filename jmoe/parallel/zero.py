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
