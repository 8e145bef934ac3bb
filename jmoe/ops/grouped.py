"""Routed experts: each token through its chosen experts' SwiGLU, weighed and summed.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, 2 SwiGLU's
gate and up halves.

All backends share one signature,

    routed_mlp(
        x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD, recipe=None, hosts=1
    ) -> y_TD
    y_t = sum_k gate_tk * (silu(x_t @ gate_e) * (x_t @ up_e)) @ down_e,  e = expert_tk

are dropless, cost time in proportion to T * K and not to E, and let gradients flow to
x, the gates and the weights. A token's experts are distinct, except that any number of
its choices may be expert E, "nobody", and contribute nothing: that is how a device
skips the experts that other devices host. With all experts on `hosts` devices, about
one choice in as many is not nobody's; room is made for that, and any number is right.

Products have x's dtype, to which weights are converted. An expert's gradient is summed
in float32 over all of its rows, and has its weights' own dtype.

Weights may be kept in fewer bits (`jmoe.ops.stored`), as matrices [E, D, 2 F] and
[E, F, D]; that is for inference, without gradients.

With a `recipe` (`jmoe.ops.fp8`), all products are FP8, by its blocks. Gate and up make
one matrix; what is summed over an expert's rows has blocks from its first row on, or
its first of each part that a backend computes at a time.

The `blocks` backends are for CPUs (`jmoe.ops.grouped_blocks`), the `ragged` ones for
Hopper GPUs (`jmoe.ops.grouped_ragged`); "auto" is the one of the platform that JAX
computes on. In those whose names end with `_apart`, nothing that x's gradient needs
waits for the weights'.
"""

import jax

from jmoe.ops.grouped_blocks import (
    RoutedMLP,
    routed_mlp_blocks,
    routed_mlp_blocks_apart,
    routed_mlp_blocks_remat,
    routed_mlp_blocks_remat_apart,
)
from jmoe.ops.grouped_ragged import routed_mlp_ragged, routed_mlp_ragged_apart

BACKENDS: dict[str, RoutedMLP] = {
    "blocks": routed_mlp_blocks,
    "blocks_remat": routed_mlp_blocks_remat,
    "ragged": routed_mlp_ragged,
    "blocks_apart": routed_mlp_blocks_apart,
    "blocks_remat_apart": routed_mlp_blocks_remat_apart,
    "ragged_apart": routed_mlp_ragged_apart,
}


def backend_name(name: str) -> str:
    """A name in BACKENDS: what "auto" is here, or the name itself."""
    if name != "auto":
        return name
    return "blocks" if jax.default_backend() == "cpu" else "ragged"
