"""Routed experts: each token through its chosen experts' SwiGLU, weighed and summed.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, 2 SwiGLU's
gate and up halves.

All backends share one signature,

    routed_mlp(
        x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD,
        recipe=None, rows=None, *, is_bound, remat, apart, after=None,
    ) -> y_TD
    y_t = sum_k gate_tk * (silu(x_t @ gate_e) * (x_t @ up_e)) @ down_e,  e = expert_tk

are dropless, cost time in proportion to T * K and not to E, and let gradients flow to
x, the gates and the weights. A token's experts are distinct, except that any number of
its choices may be expert E, "nobody", and contribute nothing: that is how a device
skips the experts that other devices compute. About `rows` choices aren't nobody's, all
of them if it is None; buffers are sized for that, and any number is right. With
`is_bound`, more of them are rare, and no memory is held for these: what they add to an
expert's gradient is rounded to its weights' dtype before, and what they add to a
token's result or gradient to x's.

Products have x's dtype, to which weights are converted. An expert's gradient is summed
in float32 over all of its rows, and has its weights' own dtype.

With `remat`, a backward pass computes the gate and up activations again, rather than
reading what the forward pass stored. With `apart`, nothing that x's gradient needs
waits for the weights' gradients, which a pipeline's schedule puts off; without, one
loop yields all gradients.

Products of the forward pass wait for the array `after`, if there is one: so what else
they need, such as weights on their way from another device, may come meanwhile.

Weights may be kept in fewer bits (`jmoe.ops.stored`), as matrices [E, D, 2 F] and
[E, F, D]; that is for inference, without gradients.

With a `recipe` (`jmoe.ops.fp8`), all products are FP8, by its blocks. Gate and up make
one matrix; what is summed over an expert's rows has blocks from its first row on, or
its first of each part that a backend computes at a time.

`blocks` is for CPUs (`jmoe.ops.grouped_blocks`). `ragged` is for Hopper GPUs
(`jmoe.ops.grouped_ragged`), and always computes activations again. `auto` is the one of
the platform that JAX computes on.
"""

from collections.abc import Callable
from typing import Any

import jax

from jmoe.ops.grouped_blocks import routed_mlp_blocks
from jmoe.ops.grouped_ragged import routed_mlp_ragged

RoutedMLP = Callable[..., jax.Array]


def routed_mlp_auto(*operands: Any, **options: Any) -> jax.Array:
    """Returns what the backend of JAX's default platform does."""
    is_cpu = jax.default_backend() == "cpu"
    return (routed_mlp_blocks if is_cpu else routed_mlp_ragged)(*operands, **options)


BACKENDS: dict[str, RoutedMLP] = {
    "auto": routed_mlp_auto,
    "blocks": routed_mlp_blocks,
    "ragged": routed_mlp_ragged,
}
