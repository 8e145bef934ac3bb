"""What a layer is told of a batch's tokens besides their hidden states.

Shapes: B batch, T position, L MoE layer (the model's, then the MTP modules'), K chosen
experts.
"""

from typing import NamedTuple

import jax

from jmoe.nn.noise import Noise
from jmoe.parallel import collectives


class Tokens(NamedTuple):
    """What there is to know of tokens at all positions, also at other devices'.

    is_real_BT: bool, where there is one to be routed to experts; None: everywhere.
    noise: where random numbers come from; None: there is to be no randomness.
    """

    is_real_BT: jax.Array | None = None
    noise: Noise | None = None

    def of_layer(self, number: jax.Array) -> "Tokens":
        """Returns what the layer of this number is told (see `jmoe.nn.block`)."""
        noise = None if self.noise is None else self.noise.of_layer(number)
        return self._replace(noise=noise)

    @property
    def is_real_BS(self) -> jax.Array | None:
        """Which of this device's positions are real."""
        if self.is_real_BT is None:
            return None
        return collectives.local_part(self.is_real_BT, "tensor", 1)


UNTOLD = Tokens()  # all are real, and nothing is random
