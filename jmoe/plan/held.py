"""What a run holds on each device between steps; nothing is compiled, no device asked.

A step needs more, for activations and for what is gathered: `jmoe.plan.aot` compiles
it. A run that is too large at rest needn't be compiled.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import rich.table
from jax.sharding import AbstractMesh

from jmoe.config import RunConfig
from jmoe.config.mesh import MESH_AXES
from jmoe.nn.model import Transformer
from jmoe.plan.aot import device_bytes
from jmoe.plan.device import H20, Device
from jmoe.train import layout as layouts
from jmoe.train.optimizer import make_optimizer
from jmoe.train.state import make_state

GB = 10**9


class Held(NamedTuple):
    """Bytes on one device, of the one that has most."""

    weights: int
    gradients: int  # reduced, they lie as the weights do, in float32 too
    moments: int

    @property
    def total(self) -> int:
        return sum(self)


def held(run: RunConfig) -> Held:
    """Returns what each device of the run's mesh holds.

    Raises:
      ValueError: a dimension doesn't divide over its axis; names the parameter.
    """
    mesh: Any = AbstractMesh(tuple(run.mesh.shape.values()), MESH_AXES)
    model = Transformer(run.model)
    layout = layouts.make_layout(model, mesh)
    optimizer = make_optimizer(run.optimizer, run.horizon, layout)
    state = layouts.abstract(layout, lambda: make_state(model, optimizer, 0))
    weights = device_bytes(state.params)
    return Held(weights, weights, device_bytes(state.opt_state))


def table(runs: Iterable[RunConfig], device: Device = H20) -> rich.table.Table:
    """Returns a row for each run: its mesh, and what a device holds."""
    made = rich.table.Table()
    made.add_column("run", no_wrap=True)
    made.add_column("mesh")
    for title in ("weights, GB", "gradients", "moments", "all"):
        made.add_column(title, justify="right")
    made.add_column(f"of {device.memory_bytes // GB} GB", justify="right")
    for run in runs:
        mesh = " ".join(f"{k}={n}" for k, n in run.mesh.shape.items() if n > 1)
        found = held(run)
        sizes = (f"{size / GB:,.1f}" for size in (*found, found.total))
        share = f"{found.total / device.memory_bytes:.0%}"
        made.add_row(run.name, mesh, *sizes, share)
    return made
