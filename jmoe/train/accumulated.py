"""A step's gradients, losses and stats, from one microbatch after the other.

Shapes: A microbatch, B sequence, T position.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.balance.losses import OF_WHOLE_STEPS
from jmoe.config import RunConfig
from jmoe.config.mesh import MESH_AXES
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer, with_loads
from jmoe.nn.router import Stats
from jmoe.parallel import collectives
from jmoe.train.layout import Layout
from jmoe.train.losses import (
    Losses,
    make_objective,
    microbatch_losses,
    normalisers,
)
from jmoe.train.weights import gather_weights, reduce_gradients, with_gathers

# Of params and router_state as they are stored, the step, and this device's part of a
# batch [A, B, T + 1]: this device's parts of the summed gradients (float32), and its
# shares of losses and stats. All are sums over microbatches.
Gradients = Callable[[Any, Any, jax.Array, Batch], tuple[Any, Losses, Stats]]

# The same without gradients, for a batch of [B, T + 1].
Shares = Callable[[Any, Any, Batch], tuple[Losses, Stats]]


def make_gradients(model: Transformer, run: RunConfig, layout: Layout) -> Gradients:
    """Makes gradients of weights gathered once, summed over devices once."""
    model = with_gathers(model, run, layout)
    objective = make_objective(run)

    def gradients(params, router_state, step, batch):
        weights, norms = gather_weights(params, layout, run), normalisers(batch, run)

        def measure(weights, state, part):
            return microbatch_losses(model, weights, state, part, run, norms)

        if counts_first(batch, run):
            _, stats = sum_microbatches(
                lambda part: measure(weights, router_state, part), batch
            )
            router_state = with_step_loads(router_state, stats, run)

        def of_microbatch(weights, part):
            losses, stats = measure(weights, router_state, part)
            return objective(losses, step), (losses, stats)

        grad = jax.grad(of_microbatch, has_aux=True)
        summed, losses, stats = accumulate(lambda part: grad(weights, part), batch)
        return reduce_gradients(summed, layout, run), losses, stats

    return gradients


def make_losses(model: Transformer, run: RunConfig, layout: Layout) -> Shares:
    """Returns a function that computes the losses of a batch at once."""
    model = with_gathers(model, run, layout)

    def losses(params, router_state, batch):
        weights, norms = gather_weights(params, layout, run), normalisers(batch, run)
        return microbatch_losses(model, weights, router_state, batch, run, norms)

    return losses


def counts_first(batch: Batch, run: RunConfig) -> bool:
    """Returns whether the auxiliary loss needs all microbatches' counts before any.

    A step then begins with a forward pass of all microbatches for the counts alone.
    """
    of_step = run.model.moe.router.auxiliary_loss in OF_WHOLE_STEPS
    return of_step and batch.tokens_BT.shape[0] > 1


def with_step_loads(router_state: Any, stats: Stats, run: RunConfig) -> Any:
    """Returns `router_state` with the counts of a step beside the biases. All-reduce.

    Args:
      stats: this device's, summed over all microbatches.
    """
    load_LE = collectives.psum(stats.load_E, MESH_AXES)
    return with_loads(router_state, load_LE, run.model)


def accumulate(
    grad: Callable[[Batch], tuple[Any, tuple[Losses, Stats]]], batch: Batch
) -> tuple[Any, Losses, Stats]:
    """Returns gradients (float32), losses and stats, summed over the microbatches."""

    def grad_float32(part):
        gradients, measured = grad(part)
        return jax.tree.map(lambda x: x.astype(jnp.float32), gradients), measured

    gradients, (losses, stats) = sum_microbatches(grad_float32, batch)
    return gradients, losses, stats


def sum_microbatches(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """Returns the sum of what `function` returns of each microbatch."""
    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens_BT.shape[0] == 1:
        return function(first)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, batch)[0]
