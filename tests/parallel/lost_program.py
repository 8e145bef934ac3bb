"""One of two processes that are at work when one of them dies or fails.

Its arguments: STAGE COORDINATOR INDEX DIRECTORY

It says "ready" when its work has begun, which then goes on for ever.
"""

import itertools
import pathlib
import sys
import time
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jmoe.checkpoint.store import Store
from jmoe.parallel import processes


def main(stage: str, coordinator: str, index: int, directory: pathlib.Path) -> None:
    if stage == "start":
        _never_starts(index)
    with processes.join(coordinator, 2, index):
        mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("all"))
        x = jax.make_array_from_callback((8,), sharding, lambda _: np.ones(2))
        {"compile": compile_, "step": step, "save": save, "fail": fail}[stage](
            x, index, directory
        )


def _never_starts(index: int) -> None:
    """Process 0 waits in JAX's start-up, to which process 1 never comes."""
    initialize = jax.distributed.initialize

    def start(*arguments, **options) -> None:
        _ready()
        if index == 0:
            initialize(*arguments, **options)
        time.sleep(600)

    jax.distributed.initialize = start


def compile_(*_) -> None:
    @jax.jit
    def long(x):
        for i in range(6000):
            x = jnp.sin(x + i) @ x
        return x

    traced = long.trace(jnp.ones((4, 4)))
    _ready()
    traced.lower().compile()
    time.sleep(600)


def step(x: jax.Array, index: int, _, fails_at: int | None = None) -> None:
    mean = jax.jit(
        jnp.mean, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec())
    )
    for count in itertools.count():
        mean(x).block_until_ready()
        if count == 0:
            _ready()
        if index == 1 and count == fails_at:
            raise OSError(5, "Input/output error", "data")


def fail(x: jax.Array, index: int, _) -> None:
    step(x, index, _, fails_at=20)


def save(x: jax.Array, _, directory: pathlib.Path) -> None:
    with Store(directory) as store:
        for count in itertools.count(1):
            store.save(count, {"x": x}, {})
            if count == 2:
                _ready()


def _ready() -> None:
    print("ready", flush=True)


def start() -> NoReturn:
    stage, coordinator, index, directory = sys.argv[1:]
    try:
        main(stage, coordinator, int(index), pathlib.Path(directory))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit()
