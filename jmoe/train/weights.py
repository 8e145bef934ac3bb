"""Weights from where they are stored to where they are used, and gradients back.

ZeRO's stage 1 gathers all weights once a step, whatever the number of microbatches, and
sums all gradients once. Stage 3 does both layer by layer in every microbatch: more
traffic, for a device that never holds more than a layer's weights. See `parallel.zero`.
"""

from typing import Any

import jax

from jmoe.config import ModelConfig, RunConfig
from jmoe.nn.model import Transformer, computed_as, is_of_layer
from jmoe.parallel import collectives, zero
from jmoe.train.layout import Layout


def gather_weights(params: Any, layout: Layout, run: RunConfig) -> Any:
    """The weights that this device computes with, but for those a layer gathers."""

    def gather(path: Any, x: jax.Array, placement: zero.Placement) -> jax.Array:
        if _waits_for_layer(path, run):
            return x
        return gather_weight(path, x, placement, run.model)

    return jax.tree.map_with_path(gather, params, layout.placements)


def reduce_gradients(gradients: Any, layout: Layout, run: RunConfig) -> Any:
    """This device's parts of the gradients, summed over all tokens, once."""

    def reduce(path: Any, x: jax.Array, placement: zero.Placement) -> jax.Array:
        if _waits_for_layer(path, run):  # a gather's transpose has summed them
            return collectives.total(x, placement.summed)
        return zero.reduce(x, placement)

    return jax.tree.map_with_path(reduce, gradients, layout.placements)


def with_gathers(model: Transformer, run: RunConfig, layout: Layout) -> Transformer:
    """The model, whose layers gather their own weights where ZeRO's stage asks so."""
    if run.mesh.zero_stage != 3:
        return model
    stacked = ("dense", "moe") if run.model.layer_loop == "scan" else ()

    def gather_layer(name: str, params: Any) -> Any:
        def gather(path: Any, x: jax.Array, placement: zero.Placement) -> jax.Array:
            placement = placement.of_layer() if name in stacked else placement
            return gather_weight(path, x, placement, run.model)

        return jax.tree.map_with_path(gather, params, layout.placements[name])

    return model.clone(gather_layer=gather_layer)


def gather_weight(
    path: Any, x: jax.Array, placement: zero.Placement, cfg: ModelConfig
) -> jax.Array:
    """One weight, gathered in the dtype that it is computed with."""
    if placement.axes:
        x = x.astype(computed_as(path, cfg))
    return zero.gather(x, placement)


def _waits_for_layer(path: Any, run: RunConfig) -> bool:
    return run.mesh.zero_stage == 3 and is_of_layer(path)
