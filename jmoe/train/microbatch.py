"""What a microbatch brings to the layers: its rows, and where its noise comes from.

Shapes: A accumulated microbatch, M microbatch of a pipeline, B sequence.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.config import RunConfig
from jmoe.data.packing import Batch
from jmoe.nn import noise as noises
from jmoe.nn.noise import Noise
from jmoe.parallel import collectives
from jmoe.parallel.mesh import BATCH_AXES


class Microbatch(NamedTuple):
    """This device's rows of one, or of several along a first dimension.

    noise: None where nothing is random, as in evaluation.
    """

    batch: Batch
    noise: Noise | None = None


def of_step(batch: Batch, step: jax.Array, run: RunConfig) -> Microbatch:
    """Returns a training step's microbatches, from this device's [A, B, T + 1] tokens.

    A row is numbered by its place in the whole batch, whatever devices there are.
    """
    count, rows = batch.tokens_BT.shape[:2]
    of_all = rows * collectives.axis_size(BATCH_AXES)
    first = rows * collectives.axis_index(BATCH_AXES)
    row_AB = of_all * jnp.arange(count)[:, None] + first + jnp.arange(rows)
    noise = noises.of_step(run.train.seed, step, row_AB)
    return Microbatch(batch, noise._replace(key=jnp.tile(noise.key, (count, 1))))


def divide(parts: Microbatch, count: int) -> Microbatch:
    """Returns the same rows as `count` microbatches, a multiple of what there are."""

    def rows(x: Any) -> jax.Array:
        total = x.shape[0] * x.shape[1]
        return jnp.reshape(x, (count, total // count, *x.shape[2:]))

    assert count % parts.batch.tokens_BT.shape[0] == 0  # see RunConfig
    batch, noise = jax.tree.map(rows, parts.batch), parts.noise
    if noise is not None:
        again = count // noise.key.shape[0]
        noise = Noise(jnp.repeat(noise.key, again, 0), rows(noise.row_B))
    return Microbatch(batch, noise)
