"""How heads' outputs become hidden states, whatever kind of attention they are of.

Shapes: B batch, T position, S this device's positions, D hidden, H head (this
device's), V value dimension.
"""

import jax

from jmoe.nn.linear import DotGeneral, Linear
from jmoe.ops.after_attention import after_attention
from jmoe.parallel import collectives


def project_out(
    out_BTHV: jax.Array, hidden_dim: int, init_std: float, dot_general: DotGeneral
) -> jax.Array:
    """Returns hidden states [B, S, D] of all heads, by a reduce-scatter over `tensor`.

    The projection is the calling module's, which has its kernel under the name `out`.
    """
    out_BTD = Linear(
        (hidden_dim,),
        ("heads", "embed"),
        init_std,
        after_attention(dot_general),
        name="out",
    )(out_BTHV.reshape(*out_BTHV.shape[:2], -1))
    return collectives.reduce_scatter(out_BTD, "tensor", 1)
