"""jmoe's side of the pipeline benchmark: a step's gradients, and its tasks one by one.

Shapes: A microbatch, B sequence, T position.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from experiments.benchmarks.workers import Tasks, warm_up
from experiments.benchmarks.workload import Workload
from jmoe.config import MeshConfig, PipelineConfig, RunConfig
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer, make_variables
from jmoe.parallel.mesh import BATCH_AXES
from jmoe.parallel.pipeline import arrays
from jmoe.parallel.pipeline.layers import Layers
from jmoe.parallel.pipeline.model import Model
from jmoe.parallel.pipeline.table import Instruction
from jmoe.parallel.schedule import gpipe
from jmoe.parallel.schedule.ticks import as_ticks
from jmoe.train import pipelined, stages
from jmoe.train.layout import WHOLE, born, make_layout, on_mesh, put_batch, run_mesh
from jmoe.train.losses import normalisers, prediction_losses, sum_losses
from jmoe.train.microbatch import Microbatch
from jmoe.train.runtime import step_after_step

_CALLS = 3


def pipeline_run(workload: Workload, ranks: int, pipeline: PipelineConfig) -> RunConfig:
    """A run whose microbatches have a sequence each."""
    return workload.run(1, mesh=MeshConfig(pipe=ranks), pipeline=pipeline)


def gradients(workload: Workload, ranks: int, pipeline: PipelineConfig) -> Tasks:
    """`step` computes a step's gradients from weights at rest; returns the loss."""
    run = pipeline_run(workload, ranks, pipeline)
    step_after_step()  # as scripts/train.py does
    model = Transformer(run.model)
    layout = make_layout(model, run_mesh(run.mesh))
    gradients_of = pipelined.make_gradients(model, run, layout)

    def measure(params, router_state, batch):
        found, losses, _ = gradients_of(params, router_state, jnp.int32(0), batch)
        return found, sum_losses(losses).main

    in_specs = (layout.stored, WHOLE, PartitionSpec(None, BATCH_AXES))
    compute = jax.jit(on_mesh(measure, layout, in_specs, (layout.stored, WHOLE)))
    variables = born(layout, functools.partial(make_variables, model, 0))
    batch = put_batch(layout, _microbatches(workload))

    def step() -> float:
        found, loss = compute(variables["params"], variables["router_state"], batch)
        jax.block_until_ready(found)
        return float(loss)

    warm_up(step)
    return {"step": step}


def alone(workload: Workload, ranks: int) -> Tasks:
    """`seconds` of each task of a step, run by itself on one device.

    The tasks are those of `ranks` stages, with the loops that the pipeline runs them
    by; what isn't there are ticks, inboxes and other ranks.
    """
    run = pipeline_run(workload, ranks, PipelineConfig())
    model = Transformer(run.model)
    layout = make_layout(model, run_mesh(MeshConfig()))
    variables = born(layout, functools.partial(make_variables, model, 0))
    batch = jax.tree.map(jnp.asarray, _microbatches(workload))
    norms = normalisers(batch, run)
    staged = pipelined.StagedModel(model, run, layout, gpipe(1, 1), norms)

    def lose(features, batch):
        return prediction_losses(features, batch, run, norms).main, ()

    params, router_state = variables["params"], variables["router_state"]
    whole = staged.model(params, router_state, Microbatch(batch), lose)
    passes = _passes(whole)
    stages_of = list(_instructions(run, ranks, workload.length))

    def seconds() -> dict[str, list[float]]:
        return _time(whole, passes, stages_of)

    warm_up(seconds)
    return {"seconds": seconds}


def _instructions(run: RunConfig, ranks: int, length: int) -> Iterator[Instruction]:
    """Yields each stage's instruction, of one device that has all layers."""
    schedule = stages.make_schedule(run.pipeline, ranks, run.train.batch_size)
    rows = stages.cut(run.model, schedule, length).values()
    for rank in range(ranks):
        yield Instruction(
            start_G=jnp.array([r.index_PR[rank, 0] for r in rows], jnp.int32),
            count_G=jnp.array([r.count_PH[rank, 0] for r in rows], jnp.int32),
            **dict.fromkeys(Instruction._fields[2:], jnp.int32(0)),
        )


def _passes(whole: Model) -> dict[str, Callable[..., Any]]:
    """F, B and W of a stage, and what the first and the last one do besides.

    They take `whole`'s weights, so that these are no constants of the programs.
    """
    batch = arrays.pick(whole.microbatches, 0)
    x = jax.eval_shape(whole.enter, whole.shared, batch)

    def layers(weights: list[Any]) -> list[Layers]:
        return [
            Layers(group._replace(weights=w), g, batch, x, again=False)
            for g, (group, w) in enumerate(zip(whole.groups, weights, strict=True))
        ]

    def forward(weights, stashes, x, step):
        for g, group in enumerate(layers(weights)):
            stashes[g], x = group.forward(stashes[g], x, 0, step, batch)
        return stashes, x

    def backward(weights, stashes, d, step):
        for g, group in reversed(list(enumerate(layers(weights)))):
            stashes[g], d = group.backward(stashes[g], d, 0, step, batch)
        return stashes, d

    def weight(weights, stashes, step):
        return [
            group.weight(stash, 0, step, batch)
            for stash, group in zip(stashes, layers(weights), strict=True)
        ]

    def lose(shared, gradients, y):
        loss, pull, _ = jax.vjp(
            lambda shared, y: whole.leave(shared, batch, y), shared, y, has_aux=True
        )
        d_shared, d = pull(jnp.ones_like(loss))
        return arrays.add(gradients, d_shared), d

    def enter_backward(shared, gradients, d):
        _, pull = jax.vjp(lambda shared: whole.enter(shared, batch), shared)
        return arrays.add(gradients, *pull(d))

    ticks = as_ticks(gpipe(1, 1))
    return {
        "stashes": jax.jit(lambda weights: [x.stash(ticks) for x in layers(weights)]),
        "F": jax.jit(forward, donate_argnums=1),
        "B": jax.jit(backward, donate_argnums=1),
        "W": jax.jit(weight, donate_argnums=1),
        "enter": jax.jit(lambda shared: whole.enter(shared, batch)),
        "lose": jax.jit(lose, donate_argnums=1),
        "enter, backward": jax.jit(enter_backward, donate_argnums=1),
    }


def _time(
    whole: Model, passes: dict[str, Callable[..., Any]], steps: list[Instruction]
) -> dict[str, list[float]]:
    """Seconds of each task, F, B and W by stage; medians."""
    weights = [group.weights for group in whole.groups]
    samples: dict[str, list[list[float]]] = {name: [] for name in passes}

    def timed(name: str, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = jax.block_until_ready(passes[name](*arguments))
        samples[name][-1].append(time.perf_counter() - start)
        return found

    for _ in range(_CALLS):
        for of_call in samples.values():
            of_call.append([])
        stashes = timed("stashes", weights)
        x = timed("enter", whole.shared)
        for step in steps:
            stashes, x = timed("F", weights, stashes, x, step)
        shared, d = timed("lose", whole.shared, arrays.zeros(whole.shared), x)
        for step in reversed(steps):
            stashes, d = timed("B", weights, stashes, d, step)
            stashes = timed("W", weights, stashes, step)
        timed("enter, backward", whole.shared, shared, d)
    del samples["stashes"]
    return {
        name: [statistics.median(times) for times in zip(*calls, strict=True)]
        for name, calls in samples.items()
    }


def _microbatches(workload: Workload) -> Batch:
    tokens_ABT = workload.token_ids()[:, None]
    return Batch(tokens_ABT, np.zeros_like(tokens_ABT))
