"""ZeRO: what the axes that don't divide a parameter would hold in copies, they divide.

A parameter has *free* axes: those its own dimensions aren't divided over. Along these,
every device computes with the same weights, on other tokens. Stage 1 of ZeRO (arXiv
1910.02054, section 5) divides the float32 master weights and the optimizer's moments
over them: a step gathers the weights, in the dtype that it computes in, and leaves each
device its part of the summed gradient, which is all that its part of the optimizer
needs. Stage 3 gathers a layer's weights when the layer needs them, and again in the
backward pass.

Everything here is by parameter: a `ParameterPlacement` says how one is stored and how
it is computed with, and whole trees are mapped. Several axes may divide several
dimensions, also such that are divided already: on thousands of devices a matrix rarely
has a dimension for all of them, and what isn't divided is summed by an all-reduce.
"""

import dataclasses
import itertools
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

Part = tuple[int, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class ParameterPlacement:
    """How one parameter lies on the mesh.

    whole: its spec when it is computed with. parts: the dimensions that free axes
    divide besides, each with its axes, the outermost first; a gradient is reduced in
    this order, and weights are gathered in the other. summed: free axes that divide
    nothing, as the sizes don't allow it; along these, parameter and optimizer state are
    copies.
    """

    whole: PartitionSpec
    parts: tuple[Part, ...]
    summed: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """The free axes that divide the parameter, in the mesh's order."""
        used = {axis for _, axes in self.parts for axis in axes}
        return tuple(axis for axis in MESH_AXES if axis in used)

    @property
    def stored(self) -> PartitionSpec:
        """The parameter's spec at rest."""
        besides = dict(self.parts)
        divided = (
            ((axis,) if axis else ()) + besides.get(dim, ())
            for dim, axis in enumerate(self.whole)
        )
        return PartitionSpec(*(axes or None for axes in divided))

    def of_layer(self) -> "ParameterPlacement":
        """Returns the placement of one layer's parameter, where this is of a stack."""
        parts = tuple((dim - 1, axes) for dim, axes in self.parts)
        return ParameterPlacement(PartitionSpec(*self.whole[1:]), parts, self.summed)


def place(boxed: Any, shape: Mapping[str, int]) -> Any:
    """Returns a `ParameterPlacement` for every parameter.

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
    whole: PartitionSpec,
    shape: Mapping[str, int],
) -> ParameterPlacement:
    """Returns the placement that divides a parameter of this size by most devices.

    Of those that do, the one with the fewest parts, each of them a collective; then
    the one with the fewest dimensions that the rules divide too; then that of the
    largest dimensions.
    """
    # Layers of a stack stay together, so that one can be gathered alone.
    left = {
        dim: size[dim] // (shape[axis] if axis else 1)
        for dim, axis in enumerate(whole)
        if dims[dim] != LAYERS
    }
    free = tuple(a for a in MESH_AXES if a not in whole and shape[a] > 1)

    def devices(part: Part) -> int:
        return math.prod(shape[axis] for axis in part[1])

    def worth(parts: tuple[Part, ...]) -> tuple[int, ...]:
        ruled = sum(whole[dim] is not None for dim, _ in parts)
        divided = math.prod(map(devices, parts))
        return divided, -len(parts), -ruled, sum(left[dim] for dim, _ in parts)

    choices = itertools.product([*left, None], repeat=len(free))
    every = (_parts(dict(zip(free, choice, strict=True))) for choice in choices)
    parts = max(
        (
            parts
            for parts in every
            if all(left[part[0]] % devices(part) == 0 for part in parts)
        ),
        key=worth,
    )
    # The most devices first, which leaves the least of a gradient to the others.
    parts = tuple(sorted(parts, key=devices, reverse=True))
    used = {axis for _, axes in parts for axis in axes}
    return ParameterPlacement(whole, parts, tuple(a for a in free if a not in used))


def _parts(dim_of: Mapping[str, int | None]) -> tuple[Part, ...]:
    """Returns parts from the dimension that each axis divides, in the mesh's order.

    `pipe` is a part's innermost axis, so that its ranks can swap what they have of
    one before anything is gathered (`gather_rows`).
    """
    axes_of: dict[int, tuple[str, ...]] = {}
    for axis in sorted(dim_of, key=lambda axis: axis == "pipe"):
        dim = dim_of[axis]
        if dim is not None:
            axes_of[dim] = (*axes_of.get(dim, ()), axis)
    return tuple(axes_of.items())


def gather(x: jax.Array, placement: ParameterPlacement) -> jax.Array:
    """Returns the parameter as it is computed with, by all-gathers.

    Its transpose is `reduce`.
    """
    return _gather(x, placement.parts)


def reduce(gradient: jax.Array, placement: ParameterPlacement) -> jax.Array:
    """Returns this device's part of the gradient summed over all tokens.

    Reduce-scatters.

    And an all-reduce of that part, over the axes that don't divide it.
    """
    return collectives.psum(_reduce(gradient, placement.parts), placement.summed)


def gather_rows(
    x: jax.Array, placement: ParameterPlacement, index_PR: np.ndarray
) -> jax.Array:
    """Returns the rows of a stack that this rank of `pipe` computes with, [R, ...].

    What `pipe` divides besides, all its ranks have a part of: they swap parts of each
    other's rows, in an all-to-all, before the rows that a rank needs are gathered. Its
    transpose is `reduce_rows`.

    Args:
      index_PR: each rank's rows; below 0 where it has fewer than R, which get any.
    """
    index_PR = np.maximum(index_PR, 0)
    dim, others = _without_pipe(placement)
    if dim is None:
        rows = x[jnp.asarray(index_PR)[collectives.axis_index("pipe")]]
    else:
        rows_PR = x[index_PR]
        rows = jax.lax.all_to_all(rows_PR, "pipe", 0, dim + 1, tiled=True)[0]
    return _gather(rows, others)


def reduce_rows(
    gradient: jax.Array, placement: ParameterPlacement, index_PR: np.ndarray, size: int
) -> jax.Array:
    """Returns this device's part of a stack's gradient.

    It is made from each rank's rows of it, [R, ...]; rows that several ranks have are
    summed. Reduce-scatters, then an all-to-all; and an all-reduce, as `reduce` has it.

    Args:
      size: of the stack.
    """
    # Beyond the end is where rows go that are none.
    index = jnp.asarray(np.where(index_PR < 0, size, index_PR))
    dim, others = _without_pipe(placement)
    rows = _reduce(gradient, others)
    if dim is None:
        index = index[collectives.axis_index("pipe")]
    else:
        rows = jax.lax.all_to_all(rows[None], "pipe", dim + 1, 0, tiled=True)
    stack = jnp.zeros((size, *rows.shape[index.ndim :]), rows.dtype)
    stack = stack.at[index].add(rows, mode="drop")
    return collectives.psum(stack, placement.summed)


def _gather(x: jax.Array, parts: Sequence[Part]) -> jax.Array:
    for dim, axes in reversed(parts):
        x = collectives.all_gather(x, axes, dim)
    return x


def _reduce(gradient: jax.Array, parts: Sequence[Part]) -> jax.Array:
    for dim, axes in parts:
        gradient = collectives.reduce_scatter(gradient, axes, dim)
    return gradient


def _without_pipe(placement: ParameterPlacement) -> tuple[int | None, tuple[Part, ...]]:
    """Returns the dimension that `pipe` divides, if any, and the other axes' parts."""
    found = (dim for dim, axes in placement.parts if "pipe" in axes)
    others = (
        (dim, tuple(axis for axis in axes if axis != "pipe"))
        for dim, axes in placement.parts
    )
    return next(found, None), tuple(others)
