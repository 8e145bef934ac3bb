"""Weights from where they are stored to where they are used, and gradients back.

ZeRO's stage 1 gathers all weights once a step, whatever the number of microbatches, and
sums all gradients once. Stage 3 does both layer by layer in every microbatch: more
traffic, for a device that never holds more than a layer's weights. See `parallel.zero`.

Weights travel in the dtype that they are computed with, gradients in float32. What
isn't gathered, or by a layer, has a float32 gradient from the product on. What is
gathered for a whole step, as all is in stage 1, leaves a microbatch's backward pass in
the dtype that it was gathered in: each of its products sums in float32 and rounds once,
and the sums over microbatches and devices are float32 again. In float32, a device would
hold 2 bytes more for each of the gathered weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.config import RunConfig
from jmoe.nn.model import Transformer, layer_names
from jmoe.nn.parameter import Parameter
from jmoe.parallel import collectives, zero
from jmoe.train.layout import Layout


def gather_weights(params: Any, layout: Layout, run: RunConfig) -> Any:
    """Returns the weights this device computes with, but for those a layer gathers.

    Args:
      params: all of a model's, or some of the entries of its tree.
    """
    dtype = run.model.dtype

    def gather(
        record: Parameter, x: jax.Array, placement: zero.ParameterPlacement
    ) -> jax.Array:
        return _gather(x, placement, record.compute_dtype(dtype))

    waiting = _waiting(run)
    return {
        name: x
        if name in waiting
        else jax.tree.map(gather, layout.records[name], x, layout.placements[name])
        for name, x in params.items()
    }


def reduce_gradients(gradients: Any, layout: Layout, run: RunConfig) -> Any:
    """Returns this device's parts of the gradients, summed over all tokens, once.

    Args:
      gradients: of what `gather_weights` returned.
    """

    def sum_over_others(x: jax.Array, placement: zero.ParameterPlacement) -> jax.Array:
        return collectives.psum(x, placement.summed)  # the gather has summed the rest

    waiting = _waiting(run)
    return {
        name: jax.tree.map(
            sum_over_others if name in waiting else zero.reduce,
            x,
            layout.placements[name],
        )
        for name, x in gradients.items()
    }


def with_gathers(model: Transformer, run: RunConfig, layout: Layout) -> Transformer:
    """Returns the model, whose layers gather their weights where ZeRO's stage asks."""
    if run.mesh.zero_stage != 3:
        return model

    def gather(
        record: Parameter, x: jax.Array, placement: zero.ParameterPlacement
    ) -> jax.Array:
        placement = placement.of_layer() if record.is_stacked else placement
        return gather_in_layer(x, placement, record.compute_dtype(run.model.dtype))

    def gather_layer(name: str, params: Any) -> Any:
        return jax.tree.map(
            gather, layout.records[name], params, layout.placements[name]
        )

    return model.clone(gather_layer=gather_layer)


def gather_in_layer(
    x: jax.Array, placement: zero.ParameterPlacement, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Gathers one float32 weight in `dtype`, and returns it in float32 again.

    That costs nothing where a product converts it back to `dtype`, and gives it a
    float32 gradient, of which this device gets its part: a reduce-scatter in float32.
    """
    gather = functools.partial(zero.gather, placement=placement)
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)

    def gathered(x):
        return _gather(x, placement, dtype).astype(jnp.float32)

    def backward(_, gradient):
        return jax.linear_transpose(gather, shape)(gradient)

    in_layer: Any = jax.custom_vjp(gathered)
    in_layer.defvjp(lambda x: (gathered(x), None), backward)
    return in_layer(x)


def _gather(
    x: jax.Array, placement: zero.ParameterPlacement, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Gathers in `dtype`, if there is anything to gather."""
    return zero.gather(x.astype(dtype), placement) if placement.axes else x


def _waiting(run: RunConfig) -> tuple[str, ...]:
    """Returns the names of the layers that gather their own weights."""
    return layer_names(run.model) if run.mesh.zero_stage == 3 else ()
