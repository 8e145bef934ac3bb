"""One of two processes that leave while a device of theirs is still at work.

Its arguments: COORDINATOR INDEX

The second device of each takes longer, and only then meets that of the other process.
"""

import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jmoe.parallel import processes

ROUNDS = 3_000_000  # a second or more


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
    print(second.is_ready(), float(second[0]))


def sum_late() -> jax.Array:
    rounds = ROUNDS * lax.axis_index("device")
    value = lax.fori_loop(0, rounds, lambda _, x: jnp.sin(x), jnp.float32(1))
    return lax.psum(value[None], "process")


if __name__ == "__main__":
    main(*sys.argv[1:])
