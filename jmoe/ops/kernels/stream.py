"""What kernels of products have in common: operands that stream through shared memory.

There are about as many blocks of threads as the GPU runs at a time, and each computes
one tile of results after another. One of its warpgroups does nothing but fetch: as long
as a stage is free it starts the copy of the next step's operands, also of the next
tile's while the others still store this one's results. Two warpgroups multiply.

Blocks that are neighbours along a result's columns can be a cluster: then operands that
they share are fetched once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.ops.kernels.launch import WARPGROUPS, launcher

CLUSTER = 2  # blocks, where the columns' tiles can be divided by it
FETCH_REGISTERS = 40  # of a thread that fetches
REGISTERS = 232  # of one that multiplies
SMS = 132  # of an H100 and an H200


def num_sms() -> int:
    """Returns the number of SMs of the GPU that is there, or of an H100."""
    device: Any = jax.local_devices()[0]
    return device.core_count if device.platform == "gpu" else SMS


class Tiles(NamedTuple):
    """How many a result has."""

    rows: int
    columns: int
    snake: int  # clusters along the columns that are computed before the next rows

    @property
    def cluster(self) -> int:
        """How many blocks of threads make a cluster: they have neighbours of a row."""
        return 1 if self.columns % CLUSTER else CLUSTER

    @property
    def clusters(self) -> int:
        return self.rows * self.columns // self.cluster

    @property
    def shared(self) -> Any:
        """The axis of a copy that all of a cluster need."""
        return "cluster" if self.cluster > 1 else None

    def place(self, index: Any) -> tuple[Any, Any]:
        """Returns this block's tile; what is computed at one time shares operands."""
        grid = self.rows, self.columns // self.cluster
        row, column = plgpu.planar_snake(index, grid, 1, self.snake)
        return row, column * self.cluster + lax.axis_index("cluster")


class Loop(NamedTuple):
    """Loops over the steps of a tile; to be called once by those that multiply."""

    count: Any
    ready: Any
    consumed: Any
    stages: int
    start: Any

    def __call__(self, body: Callable[..., Any], carry: Any) -> Any:
        """Calls `body(k, stage, release, carry)` for each step.

        It calls `release` once it has read what is in shared memory.
        """

        def of_step(k, carry):
            stage = lax.rem(self.start + k, self.stages)
            plgpu.barrier_wait(self.ready.at[stage])

            def release():
                plgpu.barrier_arrive(self.consumed.at[stage])

            return body(k, stage, release, carry)

        return lax.fori_loop(0, self.count, of_step, carry)

    def accumulate(self, body: Callable[[Any, Any], None]) -> None:
        """Adds up products, one of which runs while the next step is waited for."""

        def of_step(k, carry):
            stage = lax.rem(self.start + k, self.stages)
            plgpu.barrier_wait(self.ready.at[stage])
            body(k, stage)
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                before = lax.rem(self.start + k - 1, self.stages)
                plgpu.barrier_arrive(self.consumed.at[before])

            return carry

        lax.fori_loop(0, self.count, of_step, jnp.int32(0))
        plgpu.wgmma_wait(0)

        @pl.when(self.count > 0)
        def _():
            last = lax.rem(self.start + self.count - 1, self.stages)
            plgpu.barrier_arrive(self.consumed.at[last])


def run(
    tiles: Tiles,
    steps: Callable[[Any], Any],
    fetch: Callable[[Any], Callable[[Any, Any, Any], None]],
    compute: Callable[[Any, Loop], None],
    ready: Any,
    consumed: Any,
    stages: int,
) -> None:
    """Computes all of this block's tiles, by all of its warpgroups.

    Args:
      steps: of a tile's index, how many there are.
      fetch: of a tile's index, what starts the copies of its step k to a stage; they
        arrive at the barrier that it is given.
      compute: calls the loop and stores what it made of tile `index`.
    """
    first = lax.axis_index("block")
    count = lax.div(tiles.clusters - first + num_blocks(tiles) - 1, num_blocks(tiles))

    def index_of(i):
        return first + i * num_blocks(tiles)

    def fetch_all():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

        def of_tile(i, start):
            index = index_of(i)
            fetch_step = fetch(index)

            def of_step(k, position):
                stage = lax.rem(position, stages)

                @pl.when(position >= stages)
                def _():
                    plgpu.barrier_wait(consumed.at[stage])

                fetch_step(k, stage, ready.at[stage])
                return position + 1

            return lax.fori_loop(0, steps(index), of_step, start)

        total = lax.fori_loop(0, count, of_tile, jnp.int32(0))

        # Neighbours may not arrive at the barriers of a block that is gone.
        def wait(position, carry):
            plgpu.barrier_wait(consumed.at[lax.rem(position, stages)])
            return carry

        lax.fori_loop(lax.max(total - stages, 0), total, wait, jnp.int32(0))

    def compute_all():
        plgpu.set_max_registers(REGISTERS, action="increase")

        def of_tile(i, start):
            index = index_of(i)
            of_this = steps(index)
            compute(index, Loop(of_this, ready, consumed, stages, start))
            return start + of_this

        lax.fori_loop(0, count, of_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    is_fetching = lax.axis_index("warpgroup") == WARPGROUPS
    lax.cond(is_fetching, fetch_all, compute_all)


def num_blocks(tiles: Tiles) -> int:
    """Clusters of them."""
    return min(tiles.clusters, num_sms() // tiles.cluster)


def make(
    kernel: Callable[..., None],
    name: str,
    out: jax.ShapeDtypeStruct,
    tiles: Tiles,
    operands: list[Any],
    scratch: list[Any],
    stages: int,
) -> Any:
    """Returns a function of arrays from a kernel of refs, out's and shared memory's.

    The latter are `operands` for each stage, the two barriers, and `scratch`.
    """
    if tiles.cluster > 1:
        consumed = plgpu.ClusterBarrier(
            collective_axes=("cluster",),
            num_arrivals=WARPGROUPS,
            num_barriers=stages,
        )
    else:
        consumed = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    shared = [
        *(plgpu.SMEM((stages, *x.shape), x.dtype) for x in operands),
        plgpu.Barrier(num_arrivals=len(operands), num_barriers=stages),
        consumed,
        *scratch,
    ]
    grid = {"block": num_blocks(tiles)}
    return launcher(kernel, name, out, shared, grid, cluster=tiles.cluster)


def fill(x: jax.Array, *multiples: int) -> jax.Array:
    """Appends zeros up to multiples of these sizes."""
    missing = (-size % of for size, of in zip(x.shape, multiples, strict=True))
    return jnp.pad(x, [(0, count) for count in missing])
