"""A step's gradients, losses and stats, from one microbatch after the other.

Shapes: A microbatch, B sequence, T position.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.config import RunConfig
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer
from jmoe.nn.router import Stats
from jmoe.train.layout import Layout
from jmoe.train.losses import Losses, make_objective, microbatch_losses
from jmoe.train.weights import gather_weights, reduce_gradients, with_gathers

# Of params and router_state as they are stored, the step, and this device's part of a
# batch [A, B, T + 1]: this device's parts of the summed gradients (float32), and its
# shares of losses and stats. Losses and gradients are means over microbatches.
Gradients = Callable[[Any, Any, jax.Array, Batch], tuple[Any, Losses, Stats]]

# The same without gradients, for a batch of [B, T + 1].
Shares = Callable[[Any, Any, Batch], tuple[Losses, Stats]]


def make_gradients(model: Transformer, run: RunConfig, layout: Layout) -> Gradients:
    """Weights are gathered once, and gradients summed over devices once."""
    model = with_gathers(model, run, layout)
    objective = make_objective(run)

    def gradients(params, router_state, step, batch):
        def of_microbatch(weights, part):
            losses, stats = microbatch_losses(model, weights, router_state, part, run)
            return objective(losses, step), (losses, stats)

        weights = gather_weights(params, layout, run)
        grad = jax.grad(of_microbatch, has_aux=True)
        summed, losses, stats = accumulate(lambda part: grad(weights, part), batch)
        return reduce_gradients(summed, layout, run), losses, stats

    return gradients


def make_losses(model: Transformer, run: RunConfig, layout: Layout) -> Shares:
    """The losses of a batch at once."""
    model = with_gathers(model, run, layout)

    def losses(params, router_state, batch):
        weights = gather_weights(params, layout, run)
        return microbatch_losses(model, weights, router_state, batch, run)

    return losses


def accumulate(
    grad: Callable[[Batch], tuple[Any, tuple[Losses, Stats]]], batch: Batch
) -> tuple[Any, Losses, Stats]:
    """Mean gradients (float32), losses, and summed stats, over the microbatches."""

    def grad_float32(part):
        gradients, measured = grad(part)
        return jax.tree.map(lambda x: x.astype(jnp.float32), gradients), measured

    count = batch.tokens_BT.shape[0]
    if count == 1:
        gradients, (losses, stats) = grad_float32(jax.tree.map(lambda x: x[0], batch))
        return gradients, losses, stats

    def add(total, part):
        return jax.tree.map(jnp.add, total, grad_float32(part)), None

    first = jax.eval_shape(grad_float32, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    (gradients, (losses, stats)), _ = jax.lax.scan(add, zeros, batch)
    gradients, losses = jax.tree.map(lambda x: x / count, (gradients, losses))
    return gradients, losses, stats
