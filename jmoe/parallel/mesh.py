"""Meshes of named axes over the devices of one or many processes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jmoe.config.mesh import MESH_AXES, MeshConfig

BATCH_AXES = ("data", "expert")  # over which a batch's sequences are divided


def parse(spec: str) -> MeshConfig:
    """The mesh that "data=2,expert=4,tensor=2" describes; other axes have 1 device.

    Raises:
      ValueError: an item isn't axis=devices, or an axis is unknown or there twice.
    """
    sizes: dict[str, int] = {}
    for item in filter(None, spec.split(",")):
        axis, _, size = item.strip().partition("=")
        if axis not in MESH_AXES or axis in sizes or not size.isdecimal():
            raise ValueError(
                f"mesh={spec!r}: {item.strip()!r} must read axis=devices, with each "
                f"axis of {', '.join(MESH_AXES)} at most once."
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes, or `devices`, in the shape of `cfg`.

    Devices are taken node by node, so that the innermost axes, which talk most, lie
    within a node where they fit.

    Raises:
      ValueError: there are more or fewer devices than the mesh has.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) != cfg.num_devices:
        sizes = " x ".join(f"{axis}={size}" for axis, size in cfg.shape.items())
        raise ValueError(
            f"mesh has {sizes} = {cfg.num_devices} devices, but there are "
            f"{len(devices)}."
        )
    by_node = sorted(devices, key=_place)
    array = np.array(by_node).reshape(tuple(cfg.shape.values()))
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _place(device: Any) -> tuple[int, int, int]:
    """Puts the devices of a node, and those of a process, next to each other."""
    node = getattr(device, "slice_index", None) or 0
    return node, device.process_index, device.id
