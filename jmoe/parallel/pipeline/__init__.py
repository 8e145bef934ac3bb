"""Runs a model's training step, or its forward pass alone, by a pipeline schedule.

To be called inside of the `jax.shard_map` over the mesh; every rank of the axis `pipe`
runs the same program:

    scan over ticks:
        loops over the layers of the stages whose F, B and W are due
        hand results to neighbours: one ppermute for each way that the schedule uses

What a rank does in a tick is in a table. It is read as the loops' bounds, so that a
rank with no F in this tick loops no times, and stages need not have as many layers as
each other. No loop has a collective over `pipe`, so that ranks may differ in what they
do. In an overlapped tick (F&BW of DualPipe), a loop takes a layer of one microbatch
forward and a layer of another backward at a time: while one waits for an exchange, the
other multiplies.

The loss is taken where the backward pass begins: B of the last stage takes the stage's
output to the loss, and back, as one. So neither logits nor the head's gradient wait for
their turn. Gradients are summed over microbatches in float32, on each rank; over
devices, nothing is summed here.
"""

from jmoe.parallel.pipeline.model import LayerGroup, Model, Result
from jmoe.parallel.pipeline.run import AXIS, evaluate, train

__all__ = ["AXIS", "LayerGroup", "Model", "Result", "evaluate", "train"]
