"""What a layer is told of a batch's tokens besides their hidden states.

Shapes: B batch, T position, S this device's positions, L MoE layer (the model's, then
the MTP modules'), K chosen experts.
"""

from typing import Any, NamedTuple

import jax
from jax import lax

from jmoe.nn.noise import Noise
from jmoe.parallel import collectives


class Tokens(NamedTuple):
    """What there is to know of tokens at all positions, also at other devices'.

    is_real_BT: bool, where there is one to be routed to experts; None: everywhere.
    noise: where random numbers come from; None: there is to be no randomness.
    id_BT: int32, which tokens they are. choice_BLTK: int32, the experts that each MoE
    layer is to take; of one layer, choice_BTK. first_moe: how many layers the first MoE
    layer has before it. moe_layer: int32, a MoE layer's number among those.
    """

    is_real_BT: jax.Array | None = None
    noise: Noise | None = None
    id_BT: jax.Array | None = None
    choice_BLTK: jax.Array | None = None
    choice_BTK: jax.Array | None = None
    first_moe: int = 0
    moe_layer: Any = 0

    def of_layer(self, number: jax.Array) -> "Tokens":
        """Returns what the layer of this number is told (see `jmoe.nn.block`)."""
        noise = None if self.noise is None else self.noise.of_layer(number)
        moe_layer, choice_BTK = number - self.first_moe, None
        if self.choice_BLTK is not None:
            choice_BTK = lax.dynamic_index_in_dim(
                self.choice_BLTK, moe_layer, axis=1, keepdims=False
            )
        return self._replace(noise=noise, choice_BTK=choice_BTK, moe_layer=moe_layer)

    def here(self, x_BTX: jax.Array | None) -> Any:
        """Returns this device's positions of what is given for all; None of None."""
        return None if x_BTX is None else collectives.local_part(x_BTX, "tensor", 1)


UNTOLD = Tokens()  # all are real, and nothing is random
