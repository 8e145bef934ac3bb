"""Random numbers for tokens, the same on every mesh, accumulation and schedule.

A token's numbers follow from the step's key, the layer, the sequence's row in the
step's whole batch, and the position: so it doesn't matter which device draws them, in
which microbatch, or how often, as recomputation does.

Shapes: B sequence, T position, S this device's positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.parallel import collectives


class Noise(NamedTuple):
    """Says where a batch's random numbers come from.

    key: raw, uint32, as `jax.random.key_data` returns it; loops and pipelines carry
    arrays. row_B: int32, the sequences' rows in the step's whole batch.
    """

    key: jax.Array
    row_B: jax.Array

    def of_layer(self, number: Any) -> "Noise":
        """Returns the noise of a layer."""
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key), number)
        return self._replace(key=jax.random.key_data(key))

    def draw(self, length: int, sample: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns a sample for each of this device's positions, [B, S, ...].

        Args:
          length: how many positions S there are here; the devices of `tensor` have
            those of a sequence in a row.
          sample: a function of one key, such as `jax.random.normal`.
        """
        key = jax.random.wrap_key_data(self.key)
        first = collectives.axis_index("tensor") * length
        position_S = first + jnp.arange(length)

        def of_token(row: jax.Array, position: jax.Array) -> jax.Array:
            return sample(jax.random.fold_in(jax.random.fold_in(key, row), position))

        of_sequence = jax.vmap(of_token, (None, 0))
        return jax.vmap(of_sequence, (0, None))(self.row_B, position_S)


def of_step(seed: int, step: Any, row_B: jax.Array) -> Noise:
    """Returns the noise of a training step, which follows from the seed and `step`."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return Noise(jax.random.key_data(key), row_B)
