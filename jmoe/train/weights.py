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
from jmoe.nn.model import Transformer, computed_as, is_of_layer
from jmoe.parallel import collectives, zero
from jmoe.train.layout import Layout


def gather_weights(params: Any, layout: Layout, run: RunConfig) -> Any:
    """The weights that this device computes with, but for those a layer gathers."""

    def gather(path: Any, x: jax.Array, placement: zero.Placement) -> jax.Array:
        if _waits_for_layer(path, run):
            return x
        return _gather(x, placement, computed_as(path, run.model))

    return jax.tree.map_with_path(gather, params, layout.placements)


def reduce_gradients(gradients: Any, layout: Layout, run: RunConfig) -> Any:
    """This device's parts of the gradients, summed over all tokens, once."""

    def reduce(path: Any, x: jax.Array, placement: zero.Placement) -> jax.Array:
        if _waits_for_layer(path, run):  # the gather has summed over the others
            return collectives.psum(x, placement.summed)
        return zero.reduce(x, placement)

    return jax.tree.map_with_path(reduce, gradients, layout.placements)


def with_gathers(model: Transformer, run: RunConfig, layout: Layout) -> Transformer:
    """The model, whose layers gather their own weights where ZeRO's stage asks so."""
    if run.mesh.zero_stage != 3:
        return model
    stacked = tuple(run.model.stacks) if run.model.layer_loop == "scan" else ()

    def gather_layer(name: str, params: Any) -> Any:
        def gather(path: Any, x: jax.Array, placement: zero.Placement) -> jax.Array:
            placement = placement.of_layer() if name in stacked else placement
            return gather_in_layer(x, placement, computed_as(path, run.model))

        return jax.tree.map_with_path(gather, params, layout.placements[name])

    return model.clone(gather_layer=gather_layer)


def gather_in_layer(
    x: jax.Array, placement: zero.Placement, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """One float32 weight, gathered in `dtype`, and float32 again.

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
    x: jax.Array, placement: zero.Placement, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """In `dtype`, if there is anything to gather."""
    return zero.gather(x.astype(dtype), placement) if placement.axes else x


def _waits_for_layer(path: Any, run: RunConfig) -> bool:
    return run.mesh.zero_stage == 3 and is_of_layer(path)
