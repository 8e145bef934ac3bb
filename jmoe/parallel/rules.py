"""From the names of a parameter's dimensions to the axes that divide it.

    logical dimension -> mesh axis, or None: every device has the whole of it

The names are those that `jmoe.nn` gives with each parameter. The table is checked when
it is used: a dimension that isn't in it, is in it twice or has an axis that no mesh
has, and sizes that don't divide, are errors that name the parameter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from jax.sharding import PartitionSpec

from jmoe.config.mesh import MESH_AXES

Rules = Sequence[tuple[str, str | None]]

LAYERS = "layers"  # the dimension of a stack, as nn.scan makes it

RULES: Rules = (
    (LAYERS, None),
    ("vocab", "tensor"),
    ("embed", None),
    ("latent", None),  # MLA's down-projections are small, and work on positions
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("expert", "expert"),
    ("router_logit", None),  # every device scores all experts
)


def table(rules: Rules) -> dict[str, str | None]:
    """Returns the rules by dimension; ValueError for one twice, or an unknown axis."""
    found: dict[str, str | None] = {}
    for dim, axis in rules:
        if dim in found:
            raise ValueError(f"The rules name dimension {dim!r} twice.")
        if axis is not None and axis not in MESH_AXES:
            raise ValueError(
                f"The rules divide dimension {dim!r} over axis {axis!r}, which is not "
                f"one of {', '.join(MESH_AXES)}."
            )
        found[dim] = axis
    return found


def specs(boxed: Any, shape: Mapping[str, int], rules: Rules = RULES) -> Any:
    """Returns a `PartitionSpec` for each array of a tree of Linen's boxed variables.

    Args:
      boxed: as `jax.eval_shape(model.init, ...)` returns it; what has no box is whole
        on every device.
      shape: of the mesh, devices by axis.

    Raises:
      ValueError: the table is wrong (`table`), or doesn't fit an array, which is named.
    """
    axis_of = table(rules)
    shapes = meta.unbox(boxed)
    logical = nn.get_partition_spec(boxed)

    def convert(path: Any, array: Any, dims: PartitionSpec) -> PartitionSpec:
        name = "/".join(str(key.key) for key in path)
        axes = [_axis(name, dim, axis_of) for dim in dims]
        used = [axis for axis in axes if axis is not None]
        if len(set(used)) < len(used):
            raise ValueError(f"{name}: dimensions {tuple(dims)} share an axis: {used}.")
        for dim, axis, size in zip(dims, axes, array.shape, strict=False):
            if axis is not None and size % shape[axis]:
                raise ValueError(
                    f"{name}: dimension {dim!r} of size {size} must divide over "
                    f"{axis}={shape[axis]} devices."
                )
        return PartitionSpec(*axes)

    return jax.tree.map_with_path(convert, shapes, logical)


def _axis(name: str, dim: str | None, axis_of: Mapping[str, str | None]) -> str | None:
    if dim is None:
        return None
    if dim not in axis_of:
        raise ValueError(
            f"{name}: dimension {dim!r} is not in the rules, which know "
            f"{', '.join(axis_of)}."
        )
    return axis_of[dim]
