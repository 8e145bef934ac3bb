"""Variables that are on a disk, for devices of which each gets its part.

A process reads what its own devices get, and one device's after another's: so its host
holds one device's part of one array at a time, whatever the size of the model.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Slices = tuple[slice, ...]


class Leaves(NamedTuple):
    """Variables by path, such as "params/head", with shape and dtype of each.

    fill: sets `out[:] = leaf[index]`, of a path and a slice for each dimension, with
    start and stop; several threads may call it. It raises ValueError for what isn't
    finite.
    """

    leaves: Mapping[str, Any]
    fill: Callable[[np.ndarray, str, Slices], None]


@dataclasses.dataclass(frozen=True)
class Unread:
    """A model's variables that are yet to be read.

    open: returns a context in which they can be.
    """

    open: Callable[[], contextlib.AbstractContextManager[Leaves]]


def put(
    shape: Sequence[int],
    dtype: Any,
    sharding: jax.sharding.Sharding,
    read: Callable[[Slices], np.ndarray],
) -> jax.Array:
    """Returns an array on all devices of a sharding, which may be several processes'.

    Args:
      read: returns the part at a slice for each dimension, with start and stop. It is
        called once for each part that devices of this process have.
    """
    shape = tuple(shape)
    devices = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None, "of an array"
        parts = zip(index, shape, strict=True)
        devices[tuple(part.indices(size)[:2] for part, size in parts)].append(device)
    arrays = []
    for bounds, own in devices.items():
        x = read(tuple(slice(*pair) for pair in bounds))
        arrays += jax.block_until_ready([jax.device_put(x, device) for device in own])
    return jax.make_array_from_single_device_arrays(
        shape, sharding, arrays, dtype=dtype
    )
