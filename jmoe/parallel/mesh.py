"""Meshes of named axes over the devices of one or many processes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jmoe.config.mesh import MESH_AXES, MeshConfig

BATCH_AXES = ("data", "expert")  # over which a batch's sequences are divided
TOKEN_AXES = (*BATCH_AXES, "tensor")  # and over which its tokens are, in a layer


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of all processes' devices, or `devices`, in the shape of `cfg`.

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


def batch_part(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Returns which part of a batch's sequences a process has, and of how many.

    The devices of a process have neighbouring sequences. Processes along whose devices
    only other axes are divided have the same ones, so that there may be fewer parts
    than processes.

    Args:
      process: by default this one.

    Raises:
      ValueError: the mesh doesn't give each process as many sequences.
    """
    process = jax.process_index() if process is None else process
    shape = [size if axis in BATCH_AXES else 1 for axis, size in mesh.shape.items()]
    block = np.arange(np.prod(shape)).reshape(shape)
    block, owner = np.broadcast_arrays(
        block, np.vectorize(lambda device: device.process_index)(mesh.devices)
    )
    parts = {int(p): np.unique(block[owner == p]) for p in np.unique(owner)}
    size = len(parts[process])
    for blocks in parts.values():
        starts_a_part = blocks[0] % size == 0 and blocks[-1] == blocks[0] + size - 1
        if len(blocks) != size or not starts_a_part:
            axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
            raise ValueError(
                f"mesh {axes} gives its {len(parts)} processes different shares of a "
                "batch; choose sizes that divide their number, or are multiples of it."
            )
    return int(parts[process][0]) // size, int(block.max()) // size + 1


def _place(device: Any) -> tuple[int, int, int]:
    """Puts the devices of a node, and those of a process, next to each other."""
    node = getattr(device, "slice_index", None) or 0
    return node, device.process_index, device.id
