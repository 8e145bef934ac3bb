"""A model's weights as a decoder computes with them: layer by layer, converted once.

Layers that training stacks are taken apart: XLA copies what a loop over layers slices,
and a decoder does little else than to read weights.
"""

from typing import Any, NamedTuple

import jax

from jmoe.config import ModelConfig
from jmoe.config.model import FeedForwardConfig
from jmoe.nn.model import parameter_records
from jmoe.nn.parameter import Parameter
from jmoe.ops.stored import FewerBits

PARAMS, ROUTER_STATE = "params", "router_state"


class Weights(NamedTuple):
    """Arrays, or what stands for them in fewer bits (`jmoe.ops.stored`).

    embedding [V, D], head [D, V]. layers: each block's collections. mtp: of the first
    MTP module; None: the model has none.
    """

    embedding: jax.Array
    final_norm: Any
    head: jax.Array
    layers: tuple[Any, ...]
    mtp: Any


def prepare(cfg: ModelConfig, variables: Any) -> Weights:
    """Returns the weights in the dtypes that they are computed with.

    Those that have them already are not copied, unless they are stacked.
    """
    params = converted(cfg, variables[PARAMS])
    state = variables[ROUTER_STATE]
    head = params["embedding"].T if cfg.tie_embeddings else params["head"]
    mtp = None
    if cfg.mtp_depth:
        mtp = {PARAMS: params["mtp_0"], ROUTER_STATE: state.get("mtp_0", {})}
    final_norm = {PARAMS: params["final_norm"]}
    layers = tuple(
        {PARAMS: _of(params, *where), ROUTER_STATE: _of(state, *where)}
        for where in _places(cfg)
    )
    return Weights(params["embedding"], final_norm, head, layers, mtp)


def converted(cfg: ModelConfig, params: Any) -> Any:
    """Returns parameters in the dtypes that they are computed with."""

    def convert(record: Parameter, x: Any) -> Any:
        dtype = record.compute_dtype(cfg.dtype)
        is_kept = isinstance(x, FewerBits) or x.dtype == dtype
        return x if is_kept else x.astype(dtype)

    records = parameter_records(cfg)[PARAMS]
    return jax.tree.map(convert, records, params)


def feed_forwards(cfg: ModelConfig) -> list[FeedForwardConfig]:
    """Returns what each layer has after its attention."""
    return [stack.feed_forward for stack in cfg.stacks.values() for _ in stack.layers]


def _places(cfg: ModelConfig) -> list[tuple[str, int | None]]:
    """Returns the name of each layer's entry, and its place in it, if it is a stack."""
    if cfg.layer_loop == "scan":
        return [
            (name, i)
            for name, stack in cfg.stacks.items()
            for i in range(stack.num_layers)
        ]
    return [
        (f"{name}_{i}", None)
        for name, stack in cfg.stacks.items()
        for i in range(stack.num_layers)
    ]


def _of(tree: Any, name: str, place: int | None) -> Any:
    entry = tree.get(name, {})  # a layer without experts has no state
    return entry if place is None else jax.tree.map(lambda x: x[place], entry)
