"""One of two processes that leave while a device of theirs is still at work.

Its arguments: COORDINATOR INDEX

The second device of each only meets that of the other process once the block of `join`
has been left for LATE_S.
"""

import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jmoe.parallel import processes

LATE_S = 0.5
_may_meet = threading.Event()


def main(coordinator: str, index: str) -> None:
    with processes.join(coordinator, 2, int(index)):
        mesh = jax.make_mesh((2, 2), ("process", "device"), (AxisType.Auto,) * 2)
        late = jax.shard_map(
            sum_late, mesh=mesh, in_specs=(), out_specs=PartitionSpec("device")
        )
        found = jax.jit(late)()
        first, second = (found.addressable_data(i) for i in range(2))
        first.block_until_ready()
        print(second.is_ready())
        threading.Timer(LATE_S, _may_meet.set).start()
    print(second.is_ready(), float(second[0]))


def sum_late() -> jax.Array:
    device = lax.axis_index("device")
    mine = lax.cond(device == 1, wait_and_be_one, lambda: jnp.float32(0))
    return lax.psum(mine[None], "process")


def wait_and_be_one() -> jax.Array:
    return jax.pure_callback(one_when_set, jax.ShapeDtypeStruct((), jnp.float32))


def one_when_set() -> np.ndarray:
    _may_meet.wait()
    return np.float32(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
