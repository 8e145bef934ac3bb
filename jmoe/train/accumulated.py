"""A step's gradients, losses and measures, from one microbatch after the other.

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
from jmoe.nn.measured import Measured
from jmoe.nn.model import Transformer, with_loads
from jmoe.parallel import collectives, reductions
from jmoe.train import microbatch
from jmoe.train.layout import Layout
from jmoe.train.losses import (
    Losses,
    make_objective,
    microbatch_losses,
    normalisers,
)
from jmoe.train.microbatch import Microbatch
from jmoe.train.weights import gather_weights, reduce_gradients, with_gathers

# Of params and router_state as they are stored, the step, and this device's part of a
# batch [A, B, T + 1]: this device's parts of the summed gradients (float32), and its
# shares of losses and of what layers measured, of all microbatches together.
Gradients = Callable[[Any, Any, jax.Array, Batch], tuple[Any, Losses, Measured]]

# The same without gradients, for a batch of [B, T + 1].
Shares = Callable[[Any, Any, Batch], tuple[Losses, Measured]]


def make_gradients(model: Transformer, run: RunConfig, layout: Layout) -> Gradients:
    """Makes gradients of weights gathered once, summed over devices once."""
    model = with_gathers(model, run, layout)
    objective = make_objective(run)

    def gradients(params, router_state, step, batch):
        weights, norms = gather_weights(params, layout, run), normalisers(batch, run)
        parts = microbatch.of_step(batch, step, run)

        def measure(weights, state, part):
            return microbatch_losses(model, weights, state, part, run, norms)

        if counts_first(batch, run):
            _, found = sum_microbatches(
                lambda part: measure(weights, router_state, part), parts
            )
            router_state = with_step_loads(router_state, found, run)

        def of_microbatch(weights, part):
            losses, found = measure(weights, router_state, part)
            return objective(losses, step), (losses, found)

        grad = jax.grad(of_microbatch, has_aux=True)
        summed, losses, found = accumulate(lambda part: grad(weights, part), parts)
        return reduce_gradients(summed, layout, run), losses, found

    return gradients


def make_losses(model: Transformer, run: RunConfig, layout: Layout) -> Shares:
    """Returns a function that computes the losses of a batch at once."""
    model = with_gathers(model, run, layout)

    def losses(params, router_state, batch):
        weights, norms = gather_weights(params, layout, run), normalisers(batch, run)
        part = Microbatch(batch)
        return microbatch_losses(model, weights, router_state, part, run, norms)

    return losses


def counts_first(batch: Batch, run: RunConfig) -> bool:
    """Returns whether the auxiliary loss needs all microbatches' counts before any.

    A step then begins with a forward pass of all microbatches for the counts alone.
    """
    of_step = run.model.moe.router.auxiliary_loss in OF_WHOLE_STEPS
    return of_step and batch.tokens_BT.shape[0] > 1


def with_step_loads(router_state: Any, measured: Measured, run: RunConfig) -> Any:
    """Returns `router_state` with the counts of a step beside the biases. All-reduce.

    Args:
      measured: this device's, of all microbatches together.
    """
    assert measured.load is not None, "a model has a MoE layer"
    load_LE = collectives.psum(measured.load.load_E, MESH_AXES)
    return with_loads(router_state, load_LE, run.model)


def accumulate(
    grad: Callable[[Microbatch], tuple[Any, tuple[Losses, Measured]]], parts: Microbatch
) -> tuple[Any, Losses, Measured]:
    """Returns gradients (float32), losses and measures of all microbatches together."""

    def grad_float32(part):
        gradients, measured = grad(part)
        return jax.tree.map(lambda x: x.astype(jnp.float32), gradients), measured

    gradients, (losses, measured) = sum_microbatches(grad_float32, parts)
    return gradients, losses, measured


def sum_microbatches(function: Callable[[Microbatch], Any], parts: Microbatch) -> Any:
    """Returns what `function` returns of each microbatch, merged (`reductions`)."""
    first = jax.tree.map(lambda x: x[0], parts)
    if parts.batch.tokens_BT.shape[0] == 1:
        return function(first)

    # Traced once, for its shapes and for the loop; the program is the same without.
    function = jax.jit(function, inline=True)

    def add(total, part):
        return reductions.merge(total, function(part)), None

    zeros = reductions.nothing(jax.eval_shape(function, first))
    return jax.lax.scan(add, zeros, parts)[0]
