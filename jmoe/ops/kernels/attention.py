"""Causal attention for Hopper GPUs, forward and backward, of any sizes.

`attention_queries` has the kernels of the output and of the gradient of queries, and
`attention_keys` that of the gradients of keys and values; they take whole tiles.

Documents of a row are runs of positions. That a query sees only its own is the same as
that it sees no key before its document's first.

Shapes: B batch, T position, H head, K head of keys and values, each of which equally
many heads share, Q query/key dimension, V value dimension.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.kernels import attention_keys, attention_queries
from jmoe.ops.kernels.stream import fill

TILE = attention_queries.TILE  # and attention_keys.TILE
DIM = 64  # that head dimensions are multiples of


def forward(
    q_BTHQ: jax.Array,
    k_BTKQ: jax.Array,
    v_BTKV: jax.Array,
    segment_BT: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, H, V], and its float32 log-sum-exp [B, H, T].

    Equal segments lie next to each other.
    """
    arrays = (fill(x, 1, TILE, 1, DIM) for x in (q_BTHQ, k_BTKQ, v_BTKV))
    out, log_sum = attention_queries.forward(*arrays, _starts(segment_BT), scale=scale)
    length = q_BTHQ.shape[1]
    return out[:, :length, :, : v_BTKV.shape[-1]], log_sum[..., :length]


def backward(
    q_BTHQ: jax.Array,
    k_BTKQ: jax.Array,
    v_BTKV: jax.Array,
    segment_BT: jax.Array | None,
    out_BTHV: jax.Array,
    log_sum_BHT: jax.Array,
    d_out_BTHV: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v, given what `forward` took and returned."""
    delta_BHT = jnp.einsum(
        "bthv,bthv->bht", out_BTHV, d_out_BTHV, preferred_element_type=jnp.float32
    )
    # A row that fills up has zeros for its output's gradient, and so changes nothing.
    q, k, v, d_out = (
        fill(x, 1, TILE, 1, DIM) for x in (q_BTHQ, k_BTKQ, v_BTKV, d_out_BTHV)
    )
    log_sum, delta = (fill(x, 1, 1, TILE) for x in (log_sum_BHT, delta_BHT))
    operands = q, k, v, d_out, log_sum, delta, _starts(segment_BT)
    dq = attention_queries.gradient(*operands, scale=scale)
    dk, dv = attention_keys.gradients(*operands, scale=scale)

    def cut(x, like):
        return x[:, : like.shape[1], :, : like.shape[3]]

    return cut(dq, q_BTHQ), cut(dk, k_BTKQ), cut(dv, v_BTKV)


def _starts(segment_BT: jax.Array | None) -> jax.Array | None:
    """Returns where each position's segment starts, [B, T]."""
    if segment_BT is None:
        return None
    segment_BT = fill(segment_BT, 1, TILE)
    position_T = jnp.arange(segment_BT.shape[1], dtype=jnp.int32)
    is_first_BT = segment_BT != jnp.roll(segment_BT, 1, axis=1)
    return lax.cummax(jnp.where(is_first_BT, position_T, 0), axis=1)
