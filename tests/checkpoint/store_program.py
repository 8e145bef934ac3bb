"""Saves or restores a known state, as one of several processes.

store_program.py save|restore DIRECTORY DATA,EXPERT COORDINATOR COUNT INDEX
"""

import pathlib
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe.checkpoint.store import Store
from jmoe.parallel import processes

SPECS = {
    "split": P("data", "expert"),
    "both": P(None, ("expert", "data")),
    "half": P("expert"),
    "whole": P(),
    "scalar": P(),
}


def host_state() -> dict[str, np.ndarray]:
    """Every bit pattern counts: NaNs, negative zeros, denormals among them."""
    bits = np.random.default_rng(0).integers(0, 2**32, (5, 16, 16), dtype=np.uint32)
    state = dict(zip(SPECS, bits.view(np.float32), strict=True))
    state["scalar"] = np.array(7, np.int32)
    return state


def placed(shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """The state on the first devices of all processes, in a mesh of this shape."""
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = Mesh(devices, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    return {
        name: jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, SPECS[name]), lambda part, x=x: x[part]
        )
        for name, x in host_state().items()
    }


def assert_restored(directory: pathlib.Path, shape: tuple[int, ...]) -> None:
    """Asserts that what the directory holds comes back on such a mesh, bit for bit."""
    expected = placed(shape)
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in expected.items()
    }
    with Store(directory) as store:
        got, position, step = store.restore(wanted)
    assert (position, step) == ({"batch": 3}, 3)
    for name, x in got.items():
        assert x.sharding == expected[name].sharding
        pairs = zip(
            x.addressable_shards, expected[name].addressable_shards, strict=True
        )
        for part, same in pairs:
            assert np.asarray(part.data).tobytes() == np.asarray(same.data).tobytes()


def main(action: str, directory: str, shape: str, coordinator: str, *place: str):
    count, index = map(int, place)
    mesh_shape = tuple(map(int, shape.split(",")))
    with processes.join(coordinator, count, index, timeout_s=30):
        if action == "restore":
            assert_restored(pathlib.Path(directory), mesh_shape)
            return
        with Store(pathlib.Path(directory), keep=1) as store:
            for step in (1, 2, 3):
                store.save(step, placed(mesh_shape), {"batch": step})


if __name__ == "__main__":
    main(*sys.argv[1:])
