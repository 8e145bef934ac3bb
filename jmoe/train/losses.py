"""What a step minimises: the losses of a microbatch, and their weighted sum.

A loss is a sum over the tokens that it counts, divided by the number of those in the
whole step: in all its microbatches, on all devices (`Normalisers`). So what a token
counts for doesn't depend on where, and among which others, it is computed.

Shapes: A microbatch, B sequence, T position, S this device's positions, N = B * S, L
MoE layer, D MTP depth (but hidden dimension in BSD). Sequences have T + 1 tokens:
inputs are the first T, targets the last T.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.config import RunConfig
from jmoe.config.mesh import MESH_AXES
from jmoe.data.packing import PADDING, Batch
from jmoe.nn import block
from jmoe.nn.block import Positions
from jmoe.nn.measured import PER_MICROBATCH, PER_TOKEN, Loss, Measured
from jmoe.nn.model import Transformer
from jmoe.nn.tail import Features
from jmoe.ops import masks
from jmoe.parallel import collectives
from jmoe.parallel.mesh import BATCH_AXES
from jmoe.parallel.vocabulary import linear_cross_entropy
from jmoe.train import schedules
from jmoe.train.microbatch import Microbatch


class Losses(NamedTuple):
    """Float32 shares of a step's losses, which sum to these.

    main, mtp_D: means over their targets, in nats. layers: what layers lose, by name,
    unweighted, the sum over layers of a mean (`nn.measured.Loss.per`).
    """

    main: jax.Array
    mtp_D: jax.Array
    layers: dict[str, Loss]


class Normalisers(NamedTuple):
    """What a step's sums are divided by; the same on every device.

    targets: float32, how many tokens the main model, and then each MTP module, is to
    predict. tokens: float32, how many are real. microbatches: how many there are.
    """

    targets: tuple[jax.Array, ...]
    tokens: jax.Array
    microbatches: int


def normalisers(batch: Batch, run: RunConfig) -> Normalisers:
    """Returns the normalisers of a step, or of an evaluated batch.

    Runs an all-reduce of integers.

    Args:
      batch: this device's part, [A, B, T + 1] or [B, T + 1] tokens.
    """
    depths = range(run.model.mtp_depth + 1)
    found = [is_target(batch, depth, run) for depth in depths], is_real(batch)
    count = jax.tree.map(lambda x: x.sum(dtype=jnp.int32), found)
    targets, tokens = jax.tree.map(
        lambda n: jnp.maximum(n, 1).astype(jnp.float32),
        collectives.psum(count, BATCH_AXES),
    )
    microbatches = batch.tokens_BT.shape[0] if batch.tokens_BT.ndim == 3 else 1
    return Normalisers(tuple(targets), tokens, microbatches)


def make_objective(run: RunConfig) -> Callable[[Losses, jax.Array], jax.Array]:
    """Returns what gradients are taken of, from losses of a microbatch and the step."""
    mtp_weight = schedules.stepwise(run.train.mtp_weight, run.horizon)

    def objective(losses: Losses, step: jax.Array) -> jax.Array:
        total = losses.main + layer_objective(losses)
        if run.model.mtp_depth:
            total += mtp_weight(step) * losses.mtp_D.mean()
        return total

    return objective


def layer_objective(losses: Losses) -> jax.Array:
    """Returns what layers add to the objective."""
    weighted = [loss.weight * loss.value for loss in losses.layers.values()]
    return jnp.float32(sum(weighted))


def layer_losses(measured: Measured, run: RunConfig, norms: Normalisers) -> Losses:
    """Returns this device's share of what a stack of layers loses."""
    divisors = {PER_TOKEN: norms.tokens, PER_MICROBATCH: norms.microbatches}
    return Losses(
        main=jnp.float32(0),
        mtp_D=jnp.zeros(run.model.mtp_depth),
        layers={
            name: loss.of(loss.value.sum() / divisors.get(loss.per, 1))
            for name, loss in measured.losses.items()
        },
    )


def add_losses(first: Losses, second: Losses) -> Losses:
    """Returns the sums of two parts' losses, where either may have some of its own."""
    layers = {**first.layers, **second.layers}
    for name in first.layers.keys() & second.layers.keys():
        both = first.layers[name].value + second.layers[name].value
        layers[name] = layers[name].of(both)
    return Losses(first.main + second.main, first.mtp_D + second.mtp_D, layers)


def microbatch_losses(
    model: Transformer,
    params: Any,
    router_state: Any,
    part: Microbatch,
    run: RunConfig,
    norms: Normalisers,
) -> tuple[Losses, Measured]:
    """Returns this device's share of a microbatch's losses, and what layers measured.

    Args:
      part: this device's sequences, [B, T + 1] tokens.
    """
    batch = part.batch
    features: Any = model.apply(
        {"params": params, "router_state": router_state},
        inputs(batch),
        segments(batch, run),
        is_real(batch),
        part.noise,
        batch.choice_BLTK,
        method="features",
    )
    return prediction_losses(features, batch, run, norms), features.measured


def inputs(batch: Batch) -> jax.Array:
    return jnp.asarray(batch.tokens_BT[..., :-1])


def segments(batch: Batch, run: RunConfig) -> jax.Array | None:
    """Returns the inputs' documents, if attention is confined to them."""
    return jnp.asarray(batch.segment_BT[..., :-1]) if run.data.segment_masks else None


def is_real(batch: Batch) -> jax.Array:
    """Returns which inputs are tokens, and no padding, bool [..., T]."""
    return jnp.asarray(batch.segment_BT[..., :-1]) != PADDING


def positions(part: Microbatch, run: RunConfig) -> Positions:
    """Returns what the blocks know of the inputs' positions."""
    batch = part.batch
    told: Any = batch.choice_BLTK  # an array of JAX's by now, if any
    return block.positions(
        run.model,
        inputs(batch),
        segments(batch, run),
        is_real(batch),
        part.noise,
        told,
    )


def is_target(batch: Batch, depth: int, run: RunConfig) -> jax.Array:
    """Returns from which positions to predict token t + 1 + depth, bool [..., T].

    From those that reach the token before it (`ops.masks`), if it is a real one that
    the batch has as a target. The main model predicts a document's end, which opens the
    next one, from its last token. An MTP module doesn't go on to what follows there,
    where documents don't see each other.
    """
    is_target_BT = jnp.asarray(batch.segment_BT) != PADDING
    if batch.is_target_BT is not None:
        is_target_BT &= batch.is_target_BT
    reaches_BT = masks.reaches(depth, is_real(batch), segments(batch, run))
    return reaches_BT & masks.shift_left(is_target_BT, 1 + depth)[..., :-1]


def prediction_losses(
    features: Features, batch: Batch, run: RunConfig, norms: Normalisers
) -> Losses:
    """Returns this device's share of the losses, the layers' too."""

    def loss(hidden_BSD, depth):
        """Returns the loss of predicting, at position t, token t + 1 + depth."""
        tokens_BT = jnp.asarray(batch.tokens_BT)
        target_BT = masks.shift_left(tokens_BT, 1 + depth)[:, :-1]
        weight_BT = is_target(batch, depth, run) / norms.targets[depth]
        total: jax.Array = linear_cross_entropy(
            hidden_BSD.reshape(-1, hidden_BSD.shape[-1]),
            features.head_DV,
            collectives.local_part(target_BT, "tensor", 1).reshape(-1),
            collectives.local_part(weight_BT, "tensor", 1).reshape(-1),
            run.train.loss_chunk,
        )
        return total

    losses = layer_losses(features.measured, run, norms)
    mtp = [loss(hidden_BSD, k) for k, hidden_BSD in enumerate(features.mtp_BSD, 1)]
    return losses._replace(
        main=loss(features.hidden_BSD, 0),
        mtp_D=jnp.stack(mtp) if mtp else losses.mtp_D,
    )


def sum_losses(losses: Losses) -> Losses:
    """Sums all devices' shares.

    Those of `tensor` have the loss of the same tokens.
    """
    of_tokens = (*BATCH_AXES, "pipe")
    return Losses(
        main=collectives.psum(losses.main, of_tokens),
        mtp_D=collectives.psum(losses.mtp_D, of_tokens),
        layers=collectives.psum(losses.layers, MESH_AXES),
    )
