"""Drafts of the tokens to come, by a model's first MTP module.

The module (DeepSeek-V3, arXiv 2412.19437, section 2.2) predicts from a token's hidden
state and the token that follows the one that follows that. It has a cache of its own,
and computes each token of a step as the model does. Further drafts are its predictions
from its own output.

Shapes: T token of the step, S this device's tokens, R sequence, K draft, D hidden.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jmoe.config import ModelConfig
from jmoe.decode import layers
from jmoe.decode.batch import Heads, StepTokens, pad
from jmoe.decode.sampling import sample
from jmoe.decode.weights import Weights
from jmoe.ops.paged import Sequences
from jmoe.parallel import collectives
from jmoe.parallel.vocabulary import AXIS


def draft(
    cfg: ModelConfig,
    weights: Weights,
    cache: Any,
    seen_XV: jax.Array,
    hidden_SD: jax.Array,
    follow_T: jax.Array,
    batch: StepTokens,
    heads: Heads,
    num_drafts: int,
) -> tuple[Any, jax.Array]:
    """Returns the module's cache, and int32 [R, K] drafts behind what was just drawn.

    Each is drawn by the noise that will draw the token itself (`jmoe.decode.sampling`).

    Args:
      hidden_SD: the model's, after its final norm.
      follow_T: the token behind each.
    """
    known = layers.known(cfg, follow_T, batch.position_T, batch.groups)
    x_SD = layers.embedded(cfg, weights, follow_T)
    hidden, normed, cache = layers.mtp(cfg, weights, cache, hidden_SD, x_SD, known)
    hidden_RD, normed_RD = (layers.whole(x)[heads.index_R] for x in (hidden, normed))
    drafts = []
    for ahead in range(1, num_drafts + 1):
        # The token drawn last is behind the head; this draft is behind that.
        token_R = _drawn(weights, normed_RD, seen_XV, heads, ahead + 1)
        drafts.append(token_R)
        if ahead == num_drafts:
            break
        position_R = jnp.where(heads.position_R >= 0, heads.position_R + ahead, -1)
        position_R = jnp.where(position_R < heads.end_R, position_R, -1)
        groups = (Sequences(heads.table_RM, position_R[:, None]),)
        token_T = pad(token_R, 0)
        known = layers.known(cfg, token_T, pad(position_R, -1), groups)
        here_SD = _here(hidden_RD, len(token_T))
        x_SD = layers.embedded(cfg, weights, token_T)
        hidden, normed, cache = layers.mtp(cfg, weights, cache, here_SD, x_SD, known)
        hidden_RD, normed_RD = (
            layers.whole(x)[: len(token_R)] for x in (hidden, normed)
        )
    return cache, jnp.stack(drafts, axis=1)


def _drawn(weights, normed_RD, seen_XV, heads, ahead):
    return sample(
        layers.logits(weights, normed_RD),
        heads.draws,
        heads.position_R + ahead,
        lambda: seen_XV.at[heads.slot_R].get(mode="clip"),
    ).token


def _here(x_RD: jax.Array, tokens: int) -> jax.Array:
    """Returns this device's part of so many tokens, of which these are the first."""
    x_TD = jnp.pad(x_RD, ((0, tokens - len(x_RD)), (0, 0)))
    return collectives.local_part(x_TD, AXIS, 0)
