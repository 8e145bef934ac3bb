"""What follows the last layer: the final norm, the MTP modules, the output kernel.

It is part of `jmoe.nn.model.Transformer`, and a module of its own where the layers
before it are on other devices.

Shapes: B batch, T position, S this device's positions, D hidden, V vocabulary (this
device's part), L MoE layer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import ModelConfig
from jmoe.nn import mtp
from jmoe.nn.block import Positions
from jmoe.nn.linear import DotGeneral, RMSNorm
from jmoe.nn.measured import Measured, join, stack
from jmoe.nn.parameter import MATRIX, Parameter, normal_param
from jmoe.ops import dot, masks
from jmoe.parallel.vocabulary import embed

# What the backward pass finds stored of a block; the rest it computes again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
    "save_dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Of a layer's name and its parameters as they are stored, those it computes with.
GatherLayer = Callable[[str, Any], Any]


class Features(NamedTuple):
    """What the losses need, short of the logits, which may be too large to hold.

    hidden_BSD: after the final norm. mtp_BSD: the same of each MTP module; positions
    that don't reach a token to embed (`ops.masks`), such as the last `depth` of all,
    visit no experts and mean nothing. head_DV: the output kernel, in the dtype that it
    is held in. measured: by the layers, stacked [L, ...].
    """

    hidden_BSD: jax.Array
    mtp_BSD: tuple[jax.Array, ...]
    head_DV: jax.Array
    measured: Measured


class Tail(nn.Module):
    """Leads from the last layer's output to `Features`, with MTP modules' measures."""

    cfg: ModelConfig
    dot_general: DotGeneral = dot.dot_general
    gather_layer: GatherLayer | None = None
    apart: bool = False  # see `moe.RoutedExperts`

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        table_VD: jax.Array,
        tokens_BT: jax.Array,
        positions: Positions,
    ) -> Features:
        cfg = self.cfg
        hidden_BSD = RMSNorm(cfg.norm_eps, name="final_norm")(x_BSD)
        previous, mtp_BSD, measured = hidden_BSD, [], []
        is_real_BT = positions.tokens.is_real_BT
        if is_real_BT is None:
            is_real_BT = jnp.ones(tokens_BT.shape, bool)
        gather = None if self.is_initializing() else self.gather_layer
        for depth in range(1, cfg.mtp_depth + 1):
            name = f"mtp_{depth - 1}"
            block = prepare(mtp.MTPModule, name, cfg, gather, scanned=False)
            module = block(cfg, self.dot_general, self.apart, name=name)
            shifted_BT = masks.shift_left(tokens_BT, depth)
            embedded = embed(table_VD, shifted_BT, cfg.dtype)
            reaching_BT = masks.reaches(depth, is_real_BT, positions.segment_BT)
            told = positions.tokens._replace(is_real_BT=reaching_BT, id_BT=shifted_BT)
            previous, normed, found = module(
                previous,
                embedded,
                positions._replace(tokens=told),
                jnp.int32(cfg.num_layers + depth - 1),
            )
            mtp_BSD.append(normed)
            measured.append(stack([found]))
        if cfg.tie_embeddings:
            head_DV = table_VD.T
        else:
            record = Parameter(dims=("embed", "vocab"), matrix=MATRIX)
            shape = table_VD.shape[::-1]
            head_DV = normal_param(self, "head", shape, cfg.init_std, record)
        return Features(hidden_BSD, tuple(mtp_BSD), head_DV, join(*measured))


def prepare(
    block: type[nn.Module],
    name: str,
    cfg: ModelConfig,
    gather_layer: GatherLayer | None,
    *,
    scanned: bool,
) -> type[nn.Module]:
    """Returns `block`, which gathers its parameters and recomputes what it should."""
    if gather_layer is not None:
        gather = functools.partial(gather_layer, name)
        block = nn.map_variables(
            block, "params", lambda tree: {"params": gather(tree["params"])}
        )
    if cfg.remat == "none":
        return block
    # A scan already keeps the compiler from merging the two passes.
    policy = REMAT_POLICIES[cfg.remat]
    return nn.remat(block, policy=policy, prevent_cse=not scanned)
