"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2, eq. 21-23).

Module k predicts token t + k + 1 at position t from the hidden state of depth k - 1
and the embedding of token t + k; it has a block of its own and shares embedding and
head with the model. Depth 0 is the model's hidden state *after* its final norm, and
the two halves are concatenated embedding first: the published checkpoint's conventions,
where the paper leaves the first open and writes the second the other way round.

Shapes: B batch, T position, S this device's positions, D hidden.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import ModelConfig
from jmoe.nn import block as blocks
from jmoe.nn.block import Block, Positions
from jmoe.nn.linear import DotGeneral, Linear, RMSNorm
from jmoe.nn.measured import Measured
from jmoe.ops import dot


def empty_cache(cfg: ModelConfig, num_pages: int, page_size: int) -> Any:
    """Returns a module's collection `cache`, of a decoder that has read nothing."""
    return {"block": blocks.empty_cache(cfg, num_pages, page_size)}


def prepared(cfg: ModelConfig, params: Any) -> Any:
    """Returns a module's collection `prepared`, of its parameters."""
    return {"block": blocks.prepared(cfg, params["block"])}


class MTPModule(nn.Module):
    """One further prediction depth."""

    cfg: ModelConfig
    dot_general: DotGeneral = dot.dot_general
    apart: bool = False  # see `moe.RoutedExperts`

    @nn.compact
    def __call__(
        self,
        previous_BSD: jax.Array,
        embedded_BSD: jax.Array,
        positions: Positions,
        number: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Measured]:
        """Returns the next depth's hidden state, its norm for the head, and measures.

        Args:
          number: its block's (`jmoe.nn.block`).
        """
        cfg = self.cfg
        joined = jnp.concatenate(
            [
                RMSNorm(cfg.norm_eps, name="embedding_norm")(embedded_BSD),
                RMSNorm(cfg.norm_eps, name="hidden_norm")(previous_BSD),
            ],
            axis=-1,
        )
        project = Linear(
            (cfg.hidden_dim,),
            (None, "embed"),
            cfg.init_std,
            self.dot_general,
            formats=(),
            name="project",
        )
        block = Block.of(cfg, cfg.moe, self.dot_general, self.apart, name="block")
        hidden_BSD, measured = block(project(joined), positions, number)
        return hidden_BSD, RMSNorm(cfg.norm_eps, name="norm")(hidden_BSD), measured
