"""What a step minimises: the losses of a microbatch, and their weighted sum.

Shapes: B sequence, T position, S this device's positions, N = B * S, D MTP depth (but
hidden dimension in BSD). Sequences have T + 1 tokens: inputs are the first T, targets
the last T.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.config import RunConfig
from jmoe.config.mesh import MESH_AXES
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer
from jmoe.nn.router import Stats
from jmoe.nn.tail import Features
from jmoe.parallel import collectives
from jmoe.parallel.mesh import BATCH_AXES
from jmoe.parallel.vocabulary import linear_cross_entropy
from jmoe.train import schedules


class Losses(NamedTuple):
    """Float32 means in nats a token; `auxiliary` is unweighted, summed over layers."""

    main: jax.Array
    mtp_D: jax.Array
    auxiliary: jax.Array


def make_objective(run: RunConfig) -> Callable[[Losses, jax.Array], jax.Array]:
    """A function of a microbatch's losses and the step: what gradients are taken of."""
    mtp_weight = schedules.stepwise(run.train.mtp_weight, run.horizon)

    def objective(losses: Losses, step: jax.Array) -> jax.Array:
        total = losses.main + run.model.moe.router.auxiliary_weight * losses.auxiliary
        if run.model.mtp_depth:
            total += mtp_weight(step) * losses.mtp_D.mean()
        return total

    return objective


def microbatch_losses(
    model: Transformer, params: Any, router_state: Any, batch: Batch, run: RunConfig
) -> tuple[Losses, Stats]:
    """This device's share of a microbatch's losses, and its stats.

    Args:
      batch: this device's sequences, [B, T + 1] tokens.
    """
    features: Any = model.apply(
        {"params": params, "router_state": router_state},
        inputs(batch),
        segments(batch, run),
        method="features",
    )
    return prediction_losses(features, batch, run), features.stats


def inputs(batch: Batch) -> jax.Array:
    return jnp.asarray(batch.tokens_BT[:, :-1])


def segments(batch: Batch, run: RunConfig) -> jax.Array | None:
    """The inputs' documents, if attention is confined to them."""
    return jnp.asarray(batch.segment_BT[:, :-1]) if run.data.segment_masks else None


def prediction_losses(features: Features, batch: Batch, run: RunConfig) -> Losses:
    """This device's share of the losses; the auxiliary one is that of the stats."""
    tokens_BT = batch.tokens_BT

    def loss(hidden_BSD, depth):
        """Of predicting, at position t, token t + 1 + depth."""
        target_BT = jnp.roll(tokens_BT, -1 - depth, axis=1)[:, :-1]
        length = target_BT.shape[1]
        weight_T = (jnp.arange(length) < length - depth).astype(jnp.float32)
        weight_BT = jnp.broadcast_to(weight_T, target_BT.shape)
        weight_BT /= weight_BT.sum() * collectives.axis_size(BATCH_AXES)
        total: jax.Array = linear_cross_entropy(
            hidden_BSD.reshape(-1, hidden_BSD.shape[-1]),
            features.head_DV,
            collectives.part(target_BT, "tensor", 1).reshape(-1),
            collectives.part(weight_BT, "tensor", 1).reshape(-1),
            run.train.loss_chunk,
        )
        return total

    mtp = [loss(hidden_BSD, k) for k, hidden_BSD in enumerate(features.mtp_BSD, 1)]
    stats = features.stats
    return Losses(
        main=loss(features.hidden_BSD, 0),
        mtp_D=jnp.stack(mtp) if mtp else jnp.zeros(0),
        auxiliary=jnp.float32(0) if stats is None else stats.auxiliary_loss.sum(),
    )


def sum_losses(losses: Losses) -> Losses:
    """Of all devices' shares. Those of `tensor` have the loss of the same tokens."""
    of_tokens = (*BATCH_AXES, "pipe")
    return Losses(
        main=collectives.total(losses.main, of_tokens),
        mtp_D=collectives.total(losses.mtp_D, of_tokens),
        auxiliary=collectives.total(losses.auxiliary, MESH_AXES),
    )
