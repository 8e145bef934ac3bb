"""The next token of sequences, by a model whose parameters lie divided on a mesh.

A device gathers the weights that it computes with, as a training step does, and never
more. Of the last hidden states it computes the logits of its part of the vocabulary.

Shapes: B sequence, S position, D hidden, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jmoe.config import RunConfig
from jmoe.decode.generate import NextLogits
from jmoe.nn.model import Transformer
from jmoe.parallel import collectives, vocabulary
from jmoe.parallel.mesh import BATCH_AXES
from jmoe.train import pipelined
from jmoe.train.layout import WHOLE, Layout
from jmoe.train.step import on_mesh
from jmoe.train.weights import gather_weights, with_gathers


def make_next_logits(run: RunConfig, layout: Layout) -> NextLogits:
    """Returns a function of variables as a run's state has them, for any B and S.

    Tokens, positions and the logits are whole on all devices.
    """
    hidden_states = _hidden_states(run, layout)

    def of_device(params, router_state, tokens_BS, last_B):
        hidden_BSD = hidden_states(params, router_state, tokens_BS)
        head_DV = _head(params, run, layout)
        logits_BV = vocabulary.next_logits(hidden_BSD, head_DV, last_B)
        return collectives.all_gather(logits_BV, BATCH_AXES, 0)

    rows = PartitionSpec(BATCH_AXES)
    specs = (layout.stored, WHOLE, rows, rows)
    of_mesh = on_mesh(of_device, layout, specs, WHOLE)

    def next_logits(variables, tokens_BS, last_B):
        count, size = tokens_BS.shape
        room = -count % run.mesh.batch_parts
        tokens_BS = jnp.pad(tokens_BS, ((0, room), (0, -size % run.mesh.tensor)))
        last_B = jnp.pad(last_B, (0, room))
        params, router_state = variables["params"], variables["router_state"]
        return of_mesh(params, router_state, tokens_BS, last_B)[:count]

    return next_logits


def _hidden_states(run: RunConfig, layout: Layout):
    """Returns a function to this device's positions after the final norm, [B, S, D]."""
    if run.mesh.pipe > 1:
        return pipelined.make_hidden_states(Transformer(run.model), run, layout)
    model = with_gathers(Transformer(run.model), run, layout)

    def hidden_states(params, router_state, tokens_BS):
        weights = gather_weights(params, layout, run)
        variables = {"params": weights, "router_state": router_state}
        features: Any = model.apply(variables, tokens_BS, method="features")
        return features.hidden_BSD

    return hidden_states


def _head(params: Any, run: RunConfig, layout: Layout) -> jax.Array:
    """Returns this device's part of the output kernel, [D, V]."""
    name = "embedding" if run.model.tie_embeddings else "head"
    own = layout._replace(placements={name: layout.placements[name]})
    weight = gather_weights({name: params[name]}, own, run)[name]
    weight = weight.astype(run.model.dtype)
    return weight.T if run.model.tie_embeddings else weight
