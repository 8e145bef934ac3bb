"""A step's gradients, losses and measures, through a pipeline's stages.

A run's state knows nothing of stages: weights and moments lie as they do without a
pipeline, whose axis divides them further, as ZeRO does. A step begins by handing each
rank the layers that its stages have, and ends by handing their gradients back. So a
checkpoint is of any pipeline's shape, a stage may have any number of layers, and all
ranks have as much of the optimizer's work.

Embedding, head and MTP modules are handed to all ranks, as all run one program; the
first stage uses the one, the last stage the others.

Shapes: A accumulated microbatch, M microbatch of the pipeline, B sequence, T position,
R row (a layer that a rank has), L layer of a stack.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.config import RunConfig
from jmoe.data.packing import Batch
from jmoe.nn.block import Block
from jmoe.nn.measured import Measured, join
from jmoe.nn.model import Transformer
from jmoe.nn.parameter import Parameter
from jmoe.nn.tail import REMAT_POLICIES, Features, Tail
from jmoe.parallel import collectives, pipeline, reductions, zero
from jmoe.parallel.schedule import Schedule, gpipe
from jmoe.parallel.schedule.ticks import as_ticks, forward_only
from jmoe.parallel.vocabulary import embed
from jmoe.train import microbatch, stages
from jmoe.train.accumulated import (
    Gradients,
    Shares,
    counts_first,
    with_step_loads,
)
from jmoe.train.layout import Layout
from jmoe.train.losses import (
    Losses,
    Normalisers,
    add_losses,
    inputs,
    layer_losses,
    layer_objective,
    make_objective,
    normalisers,
    positions,
    prediction_losses,
)
from jmoe.train.microbatch import Microbatch
from jmoe.train.stages import RankLayers
from jmoe.train.weights import gather_weights, reduce_gradients


def make_gradients(model: Transformer, run: RunConfig, layout: Layout) -> Gradients:
    """Returns what `accumulated.make_gradients` does, by the run's schedule."""
    objective = make_objective(run)

    def gradients(params, router_state, step, batch):
        given = batch.tokens_BT.shape[0]
        count = run.pipeline.microbatches or given
        parts = microbatch.divide(microbatch.of_step(batch, step, run), count)
        schedule = stages.make_schedule(run.pipeline, run.mesh.pipe, count)
        norms = normalisers(parts.batch, run)
        staged = StagedModel(model, run, layout, schedule, norms)

        def lose(features, batch):
            losses = prediction_losses(features, batch, run, norms)
            return objective(losses, step), (losses, features.measured)

        if counts_first(parts.batch, run):
            _, found = _evaluate(
                model, run, layout, params, router_state, parts, _predict_nothing
            )
            router_state = with_step_loads(router_state, found, run)
        cut = staged.model(params, router_state, parts, lose)
        found = pipeline.train(
            as_ticks(schedule), cut, recompute=run.pipeline.remat == "stage"
        )
        summed = staged.reduce(found.shared, found.groups)
        return summed, *staged.measured(found)

    return gradients


def make_losses(model: Transformer, run: RunConfig, layout: Layout) -> Shares:
    """Does as `accumulated.make_losses`, with forward passes of parts of the batch."""

    def losses(params, router_state, batch):
        parts = _for_forward(batch, run)
        return _evaluate(
            model, run, layout, params, router_state, parts, prediction_losses
        )

    return losses


def _predict_nothing(
    features: Features, batch: Batch, run: RunConfig, norms: Normalisers
) -> Losses:
    """Returns the losses of the layers alone, for which there need be no logits."""
    return layer_losses(features.measured, run, norms)


def _evaluate(
    model: Transformer,
    run: RunConfig,
    layout: Layout,
    params: Any,
    router_state: Any,
    parts: Microbatch,
    lose: Callable[[Features, Batch, RunConfig, Normalisers], Losses],
) -> tuple[Losses, Measured]:
    """Returns this device's share of losses and measures, by forward passes only.

    Args:
      lose: a microbatch's losses; `prediction_losses`, if they are wanted.
    """
    norms, schedule = normalisers(parts.batch, run), _forward_schedule(parts, run)
    staged = StagedModel(model, run, layout, schedule, norms)

    def measure(features, batch):
        losses = lose(features, batch, run, norms)
        return losses.main, (losses, features.measured)

    cut = staged.model(params, router_state, parts, measure)
    return staged.measured(pipeline.evaluate(as_ticks(schedule), cut))


def make_hidden_states(
    model: Transformer, run: RunConfig, layout: Layout
) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """Returns a function to hidden states after the final norm, [B, S, D].

    That is inference, of tokens [B, T].

    A function of params and router_state as they are stored and of this device's
    sequences, for the inside of `jax.shard_map` over the mesh. All ranks of `pipe` get
    the result, by an all-reduce.
    """

    def of_features(features, _):
        return jnp.float32(0.0), features.hidden_BSD

    def hidden_states(params, router_state, tokens_BT):
        padded: Any = jnp.pad(tokens_BT, ((0, 0), (0, 1)))  # as if with a last target
        unmasked: Any = jnp.zeros_like(padded)
        parts = _for_forward(Batch(padded, unmasked), run)
        schedule = _forward_schedule(parts, run)
        staged = StagedModel(
            model, run, layout, schedule, normalisers(parts.batch, run)
        )
        cut = staged.model(params, router_state, parts, of_features)
        hidden = pipeline.evaluate(as_ticks(schedule), cut).left
        hidden_BSD = hidden.reshape(-1, *hidden.shape[2:])
        return collectives.psum(hidden_BSD, pipeline.AXIS)

    return hidden_states


def _for_forward(batch: Batch, run: RunConfig) -> Microbatch:
    """Returns [B, T + 1] as microbatches, about two for each rank."""
    count = math.gcd(batch.tokens_BT.shape[0], 2 * run.mesh.pipe)
    whole = Microbatch(jax.tree.map(lambda x: x[None], batch))
    return microbatch.divide(whole, count)


def _forward_schedule(parts: Microbatch, run: RunConfig) -> Schedule:
    return forward_only(gpipe(run.mesh.pipe, parts.batch.tokens_BT.shape[0]))


class StagedModel:
    """A model's pieces for the ranks of a schedule, and what comes back from them."""

    def __init__(
        self,
        model: Transformer,
        run: RunConfig,
        layout: Layout,
        schedule: Schedule,
        norms: Normalisers,
    ):
        self.run, self.layout, self.norms = run, layout, norms
        self.dot_general = model.dot_general
        self.cfg = run.model
        self.rows = stages.cut(run.model, schedule, run.data.sequence_length)

    def model(
        self,
        params: Any,
        router_state: Any,
        parts: Microbatch,
        lose: Callable[[Features, Batch], tuple[jax.Array, Any]],
    ) -> pipeline.Model:
        """Returns what `pipeline` runs, with the weights that this rank computes with.

        Args:
          lose: a microbatch's objective, and what is to be measured of it.
        """
        run, cfg = self.run, self.cfg
        shared = {k: x for k, x in params.items() if k not in self.rows}
        shared = gather_weights(shared, self.layout, run)

        def state(name: str, rows: RankLayers) -> tuple[Any, jax.Array]:
            """Returns what layers have besides weights: router state, and numbers."""
            of_all = router_state.get(name, {}), jnp.asarray(rows.number_L)
            return _own(of_all, rows)

        def enter(shared, part):
            return embed(shared["embedding"], inputs(part.batch), cfg.dtype)

        def leave(shared, part, x_BSD):
            features: Any = Tail(cfg, self.dot_general, apart=True).apply(
                {"params": shared, "router_state": router_state},
                x_BSD,
                shared["embedding"],
                inputs(part.batch),
                positions(part, run),
            )
            return lose(features, part.batch)

        return pipeline.Model(
            enter=enter,
            leave=leave,
            shared=shared,
            groups=[
                pipeline.LayerGroup(
                    layer=self._layer(name),
                    weights=self._gather(name, params[name]),
                    state=state(name, rows),
                    start=rows.start_PH,
                    count=rows.count_PH,
                )
                for name, rows in self.rows.items()
            ],
            microbatches=parts,
        )

    def reduce(self, shared: Any, groups: list[Any]) -> Any:
        """Returns this device's parts of the gradients, in the parameters' tree."""
        found = reduce_gradients(shared, self.layout, self.run)
        for (name, rows), gradients in zip(self.rows.items(), groups, strict=True):
            found[name] = jax.tree.map(
                functools.partial(
                    zero.reduce_rows, index_PR=rows.index_PR, size=self._size(name)
                ),
                gradients,
                self.layout.placements[name],
            )
        return found

    def measured(self, found: pipeline.Result) -> tuple[Losses, Measured]:
        """Returns this device's share of losses, and of what all layers measured."""
        (losses, tail), stacks = reductions.along(found.left), []
        for (name, rows), of_rows in zip(
            self.rows.items(), found.measured, strict=True
        ):
            size = self._size(name)
            index_R = _own_index(rows, instead=size)
            stacks.append(reductions.place(of_rows, index_R, size))
        for stack in stacks:
            losses = add_losses(losses, layer_losses(stack, self.run, self.norms))
        return losses, join(*stacks, tail)

    def _layer(self, name: str) -> Callable[..., Any]:
        run, cfg, norms = self.run, self.cfg, self.norms
        block = Block.of(
            cfg, cfg.stacks[name].feed_forward, self.dot_general, apart=True
        )

        def layer(weights, state, part, x_BSD):
            router_state, number = state
            found: Any = block.apply(
                {"params": weights, "router_state": router_state},
                x_BSD,
                positions(part, run),
                number,
            )
            y_BSD, measured = found
            objective = layer_objective(layer_losses(measured, run, norms))
            return (y_BSD, objective), measured

        if cfg.remat == "none":
            return layer
        return jax.checkpoint(layer, policy=REMAT_POLICIES[cfg.remat])

    def _gather(self, name: str, stack: Any) -> Any:
        """Returns this rank's rows of a stack's weights, in the compute dtypes."""
        index_PR, layout = self.rows[name].index_PR, self.layout

        def gather(
            record: Parameter, x: jax.Array, placement: zero.ParameterPlacement
        ) -> jax.Array:
            x = x.astype(record.compute_dtype(self.cfg.dtype))
            return zero.gather_rows(x, placement, index_PR)

        return jax.tree.map(
            gather, layout.records[name], stack, layout.placements[name]
        )

    def _size(self, name: str) -> int:
        return self.cfg.stacks[name].num_layers


def _own(tree: Any, rows: RankLayers) -> Any:
    index_R = _own_index(rows, instead=0)
    return jax.tree.map(lambda x: x[index_R], tree)


def _own_index(rows: RankLayers, *, instead: int) -> jax.Array:
    """Returns this rank's layers, and something else where it has fewer than most."""
    index_PR = jnp.where(rows.index_PR < 0, instead, rows.index_PR)
    return index_PR[collectives.axis_index(pipeline.AXIS)]
