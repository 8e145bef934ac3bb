"""Devices get their parts of what is on a disk, and each part is read once."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jmoe.checkpoint import unread

STORED = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (P(), (8, 12)),
        (P("expert"), (4, 12)),  # each for four devices, which are no neighbours
        (P("tensor", "expert"), (2, 6)),
        (P(None, "tensor"), (8, 3)),
    ],
)
def test_a_part_that_several_devices_have_is_read_once(spec, part):
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("tensor", "expert"), axis_types=(AxisType.Auto,) * 2)
    read = []

    def give(index):
        read.append(index)
        return STORED[index]

    sharding = NamedSharding(mesh, spec)
    x = unread.put(STORED.shape, STORED.dtype, sharding, give)
    assert x.sharding == sharding and x.dtype == STORED.dtype
    np.testing.assert_array_equal(x, STORED)
    sizes = [tuple(part.stop - part.start for part in index) for index in read]
    assert set(sizes) == {part}
    assert len(read) * np.prod(part) == STORED.size


def test_one_device_gets_all_and_a_scalar_has_no_parts():
    sharding = SingleDeviceSharding(jax.devices()[3])
    x = unread.put(STORED.shape, STORED.dtype, sharding, STORED.__getitem__)
    assert x.devices() == {jax.devices()[3]}
    np.testing.assert_array_equal(x, STORED)
    seven = unread.put((), np.int32, sharding, lambda index: np.array(7, np.int32))
    assert seven == 7 and seven.shape == ()
