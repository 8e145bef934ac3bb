"""The kinds of feed-forward layers that a block can have, as `jmoe.nn.mixers` has them.

Shapes: B batch, T position, S this device's positions, D hidden.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from jmoe.config import DenseConfig, MoEConfig
from jmoe.nn.linear import DotGeneral
from jmoe.nn.measured import NOTHING, Measured
from jmoe.nn.moe import MoE, SwiGLU
from jmoe.nn.tokens import UNTOLD, Tokens
from jmoe.ops import dot


class FeedForward(NamedTuple):
    """What there is to know of a kind.

    module: of the kind's record, the standard deviation of new weights, a
      `dot_general`, and whether a pipeline's backward passes come apart
      (`moe.RoutedExperts`); maps hidden states [B, S, D], and what it is told of the
      tokens, to [B, S, D] and what it measured.
    name: of its parameters in a block's.
    cost: of the record and the hidden dimension, a token's operations in a forward
      pass.
    """

    module: Callable[..., nn.Module]
    name: str
    cost: Callable[[Any, int], float]


class Dense(nn.Module):
    """`SwiGLU` as a kind of feed-forward; measures nothing."""

    cfg: DenseConfig
    init_std: float
    dot_general: DotGeneral = dot.dot_general
    apart: bool = False  # it has no loop

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, tokens: Tokens = UNTOLD
    ) -> tuple[jax.Array, Measured]:
        del tokens  # every position visits it
        mlp = SwiGLU(self.cfg.mlp_dim, self.init_std, self.dot_general)
        nn.share_scope(self, mlp)
        return mlp(x_BSD), NOTHING


def _dense_cost(cfg: DenseConfig, hidden_dim: int) -> float:
    return 6 * hidden_dim * cfg.mlp_dim


def _moe_cost(cfg: MoEConfig, hidden_dim: int) -> float:
    visited = cfg.router.top_k + cfg.num_shared_experts
    router = 2 * hidden_dim * cfg.router.num_experts
    return router + 6 * visited * hidden_dim * cfg.expert_mlp_dim


FEED_FORWARDS: Mapping[str, FeedForward] = {
    "dense": FeedForward(Dense, "mlp", _dense_cost),
    "moe": FeedForward(MoE, "moe", _moe_cost),
}
