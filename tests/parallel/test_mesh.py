"""Meshes from their descriptions, and the order of their devices."""

import dataclasses

import jax
import pytest

from jmoe.config import MeshConfig
from jmoe.parallel.mesh import batch_part, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh reads of a device."""

    id: int
    process_index: int
    slice_index: int


def test_a_mesh_has_all_its_axes_and_takes_devices_in_order():
    mesh = make_mesh(MeshConfig.parse("data=2,expert=4,tensor=2"))
    assert dict(mesh.shape) == {"data": 2, "pipe": 1, "expert": 4, "tensor": 2}
    assert [d.id for d in mesh.devices.flat] == list(range(16))


@pytest.mark.parametrize("spec", ["data=2", "data=4,expert=8", ""])
def test_a_mesh_of_another_size_than_the_devices_is_refused(spec):
    with pytest.raises(ValueError, match=r"tensor=1 = \d+ devices, but there are 16\."):
        make_mesh(MeshConfig.parse(spec))


def test_the_innermost_axis_lies_within_a_node():
    """Two nodes of two processes, whose devices JAX lists in no helpful order."""
    devices = [Device(id=i, process_index=i % 4, slice_index=i % 2) for i in range(16)]
    mesh = make_mesh(MeshConfig.parse("data=2,tensor=8"), devices)
    for node, row in enumerate(mesh.devices.reshape(2, 8)):
        assert {device.slice_index for device in row} == {node}
        processes = [device.process_index for device in row]
        assert processes == sorted(processes)


def test_a_mesh_over_some_devices_takes_those():
    mesh = make_mesh(MeshConfig.parse("data=2"), jax.devices()[4:6])
    assert [d.id for d in mesh.devices.flat] == [4, 5]


def mesh_of(spec: str, num_processes: int):
    """A mesh of processes that have equally many devices."""
    cfg = MeshConfig.parse(spec)
    each = cfg.num_devices // num_processes
    return make_mesh(cfg, [Device(i, i // each, 0) for i in range(cfg.num_devices)])


@pytest.mark.parametrize(
    ("spec", "num_processes", "parts"),
    [
        ("data=2,expert=4", 1, [(0, 1)]),
        ("data=2,expert=4", 2, [(0, 2), (1, 2)]),
        ("data=2,expert=2,tensor=4", 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # a tensor group over two processes, which read the same sequences
        ("expert=2,tensor=4", 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ("tensor=4", 2, [(0, 1), (0, 1)]),
    ],
)
def test_a_process_reads_the_sequences_of_its_devices(spec, num_processes, parts):
    mesh = mesh_of(spec, num_processes)
    assert [batch_part(mesh, i) for i in range(num_processes)] == parts


@pytest.mark.parametrize("spec", ["expert=3,tensor=4", "data=3,tensor=2"])
def test_processes_with_different_shares_of_a_batch_are_refused(spec):
    with pytest.raises(ValueError, match="its 2 processes different shares of a batch"):
        batch_part(mesh_of(spec, 2), 0)
