"""Which experts a model chooses for each token, read out: to look at, or to replay.

Shapes: B batch, L MoE layer (the model's, then one for each MTP module), T position, K
chosen experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import ModelConfig
from jmoe.nn.choices import Routing
from jmoe.nn.model import Transformer, bias_paths
from jmoe.nn.router import Router

COLLECTION = "intermediates"  # where Flax leaves what it captures


class Recorded(NamedTuple):
    """int32 experts, the best by biased score first, and their float32 gates.

    expert_BLTK is what a router of kind `replayed` takes as its choices. A token that
    visits no expert, as the last ones of an MTP module, has the number E of experts.
    """

    expert_BLTK: jax.Array
    gate_BLTK: jax.Array


def record_choices(cfg: ModelConfig, variables: Any, tokens_BT: jax.Array) -> Recorded:
    """Returns the choices of one pass over the tokens; jit it with `cfg` static.

    Args:
      variables: {"params": ..., "router_state": ...}.

    Raises:
      ValueError: experts choose tokens in this model, not tokens experts.
    """

    def is_router(module: nn.Module, method: str) -> bool:
        return isinstance(module, Router) and method == "__call__"

    _, found = Transformer(cfg).apply(
        variables,
        tokens_BT,
        method="features",
        capture_intermediates=is_router,
        mutable=[COLLECTION],
    )
    experts, gates = [], []
    for *path, _ in bias_paths(cfg):
        node = found[COLLECTION]
        for name in path:
            node = node[name]
        ((routing, _),) = node["__call__"]
        if not isinstance(routing, Routing):
            raise ValueError(
                f"model.moe.router.kind={cfg.moe.router.kind!r}: experts choose their "
                "tokens; there are no tokens' choices to record."
            )
        shape = -1, *tokens_BT.shape, cfg.moe.router.top_k
        experts.append(routing.expert_NK.reshape(shape))
        gates.append(routing.gate_NK.reshape(shape))
    joined = (jnp.concatenate(x).swapaxes(0, 1) for x in (experts, gates))
    return Recorded(*joined)
