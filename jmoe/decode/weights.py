"""A model's weights as a decoder computes with them: layer by layer, converted once.

Layers that training stacks are taken apart: XLA copies what a loop over layers slices,
and a decoder does little else than to read weights.
"""

from typing import Any, NamedTuple

import jax

from jmoe.config import ModelConfig
from jmoe.config.model import FeedForwardConfig
from jmoe.nn import block
from jmoe.nn import mtp as mtp_module
from jmoe.nn.cached import PREPARED
from jmoe.nn.model import parameter_records
from jmoe.nn.parameter import Parameter
from jmoe.ops.stored import FewerBits

PARAMS, ROUTER_STATE = "params", "router_state"


class LayerPlace(NamedTuple):
    """The entry of the variables' trees that has a layer, and its index in a stack."""

    name: str
    index: int | None


MTP = LayerPlace("mtp_0", None)


class Layer(NamedTuple):
    """A block: what it has after its attention, its number, and its collections.

    number: an int, or an array on a mesh.
    """

    feed_forward: FeedForwardConfig
    number: Any
    collections: Any


class Weights(NamedTuple):
    """Arrays, or what stands for them in fewer bits (`jmoe.ops.stored`).

    embedding [V, D]. head [D, V]; None: it is the embedding. final_norm: its
    collections. layers: of each block.
    mtp: the collections of the first MTP module; None: the model has none.
    """

    embedding: jax.Array
    final_norm: Any
    head: jax.Array | None
    layers: tuple[Any, ...]
    mtp: Any


def prepare(cfg: ModelConfig, variables: Any) -> Weights:
    """Returns the weights in the dtypes that they are computed with.

    Those that have them already are not copied, unless they are stacked. `layers` are
    the blocks' collections, with what is computed of parameters once.
    """
    params = _converted(cfg, variables[PARAMS])
    state = variables[ROUTER_STATE]
    collections = {PARAMS: params, ROUTER_STATE: state}

    def made(where: LayerPlace, prepared: Any) -> Any:
        layer = layer_of(collections, where)
        return {**layer, PREPARED: prepared(cfg, layer[PARAMS])}

    layers = tuple(made(where, block.prepared) for where in places(cfg))
    mtp = made(MTP, mtp_module.prepared) if cfg.mtp_depth else None
    return assemble(params, layers, mtp)


def assemble(params: Any, layers: tuple[Any, ...], mtp: Any) -> Weights:
    """Returns the weights of layers, with what is before and behind them."""
    final_norm = {PARAMS: params["final_norm"]}
    return Weights(params["embedding"], final_norm, params.get("head"), layers, mtp)


def ends(cfg: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the parameters before and behind the layers."""
    head = () if cfg.tie_embeddings else ("head",)
    return ("embedding", "final_norm", *head)


def layers_of(cfg: ModelConfig, weights: Weights) -> list[Layer]:
    """Returns the model's blocks, in their order."""
    kinds = feed_forwards(cfg)
    numbered = zip(kinds, range(len(kinds)), weights.layers, strict=True)
    return [Layer(*layer) for layer in numbered]


def _converted(cfg: ModelConfig, params: Any) -> Any:
    """Returns parameters in the dtypes that they are computed with."""

    def convert(record: Parameter, x: Any) -> Any:
        dtype = record.compute_dtype(cfg.dtype)
        if isinstance(x, FewerBits):
            return x
        return x if x.dtype == dtype else x.astype(dtype)

    records = parameter_records(cfg)[PARAMS]
    return jax.tree.map(convert, records, params)


def feed_forwards(cfg: ModelConfig) -> list[FeedForwardConfig]:
    """Returns what each layer has after its attention."""
    return [stack.feed_forward for stack in cfg.stacks.values() for _ in stack.layers]


def places(cfg: ModelConfig) -> list[LayerPlace]:
    """Returns where each layer's variables are."""
    is_stacked = cfg.layer_loop == "scan"
    return [
        LayerPlace(name, i) if is_stacked else LayerPlace(f"{name}_{i}", None)
        for name, stack in cfg.stacks.items()
        for i in range(stack.num_layers)
    ]


def layer_of(variables: Any, place: LayerPlace) -> Any:
    """Returns a layer's collections."""
    return {name: _of(variables[name], place) for name in (PARAMS, ROUTER_STATE)}


def _of(tree: Any, place: LayerPlace) -> Any:
    entry = tree.get(place.name, {})  # a layer without experts has no state
    if place.index is None:
        return entry
    return jax.tree.map(lambda x: x[place.index], entry)
