"""Compiles a run's training step for a mesh of GPUs that aren't there.

XLA needs a description of the GPU and the shapes of the arrays, and nothing else: no
GPU, no driver, no weights. Out comes the program that would run, with its kernels, its
schedule and its memory. What needs a GPU to be found out is missing: the choice between
kernels by trying them, and time.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.experimental import topologies

from jmoe.config import RunConfig
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer
from jmoe.ops import fp8
from jmoe.parallel import compiler
from jmoe.parallel.mesh import make_mesh
from jmoe.plan.device import Device
from jmoe.train import layout as layouts
from jmoe.train.optimizer import make_optimizer
from jmoe.train.state import TrainState, make_state
from jmoe.train.step import TrainStep, make_train_step

NODE = 8  # GPUs that share a node


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocated:
    """Bytes that a program needs of one device, as the compiler counts them."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(Allocated):
    """Bytes on one device while a training step runs.

    parameters_even, optimizer_even: what it would hold of these if every device had the
    same part, and none a copy.
    """

    parameters: int
    optimizer: int
    parameters_even: float
    optimizer_even: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled step: its optimised HLO, and what compiling it took."""

    text: str
    memory: Any  # an `Allocated`, of the kind of program that it is
    seconds: float  # to trace, lower and compile
    cpu_seconds: float  # the CPU's meanwhile, in this process's threads
    host_bytes: int  # this process's most, ever


def absent_devices(device: Device, count: int) -> Sequence[Any]:
    """Returns `count` devices in nodes of `NODE`, to make a mesh of and compile for.

    Raises:
      ValueError: JAX's CUDA plugin, which compiles for GPUs, isn't installed.
    """
    per_node = min(count, NODE)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=device.target_config,
            topology=f"1x{count // per_node}x{per_node}",
        )
    except NotImplementedError as error:
        raise ValueError("Compiling for GPUs needs pip install 'jmoe[gpu]'.") from error
    return topology.devices


def compile_step(run: RunConfig, devices: Sequence[Any]) -> Program:
    """Compiles the training step of `run` for `run.mesh` made of `devices`."""
    start = now()
    step, state, batch = abstract_step(run, devices)
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    return _compile(lowered, state, devices, start)


def compile_optimizer(run: RunConfig, devices: Sequence[Any]) -> Program:
    """Compiles the optimizer's part of the step alone.

    Updates take the gradients' place.
    """
    start = now()
    model, optimizer, layout = _parts(run, devices)
    state = layouts.abstract(layout, lambda: make_state(model, optimizer, 0))

    def step(params: Any, opt_state: Any, gradients: Any) -> Any:
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, updates

    donated = jax.jit(step, donate_argnums=(0, 1, 2))
    lowered = donated.lower(state.params, state.opt_state, state.params)
    return _compile(lowered, state, devices, start)


def now() -> tuple[float, float]:
    """Returns seconds that passed, and those of this process's CPU, since any time."""
    return time.perf_counter(), time.process_time()


def _compile(
    lowered: Any, state: TrainState, devices: Sequence[Any], start: tuple[float, float]
) -> Program:
    def memory(**sizes: int) -> Memory:
        return Memory(
            parameters=device_bytes(state.params),
            optimizer=device_bytes(state.opt_state),
            parameters_even=whole_bytes(state.params) / len(devices),
            optimizer_even=whole_bytes(state.opt_state) / len(devices),
            **sizes,
        )

    return compile_lowered(lowered, memory, devices, start)


def compile_lowered(
    lowered: Any,
    memory: Callable[..., Any],
    devices: Sequence[Any],
    start: tuple[float, float],
) -> Program:
    """Returns the program that a lowered function is on these devices.

    Args:
      memory: makes its `memory` of the bytes that the compiler counts: `arguments`,
        `outputs`, `aliased` and `temporaries`.
      start: what `now` returned before it was traced.
    """
    options = compiler.options(devices[0].platform)
    compiled: Any = lowered.compile(compiler_options=options)
    seconds, cpu_seconds = (end - then for end, then in zip(now(), start, strict=True))
    stats = compiled.memory_analysis()
    return Program(
        text=compiled.as_text(),
        memory=memory(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
        ),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        host_bytes=_peak_host_bytes(),
    )


def abstract_step(
    run: RunConfig, devices: Sequence[Any]
) -> tuple[TrainStep, TrainState, Any]:
    """Returns the step, and shapes of its state and batch that know where they lie."""
    model, optimizer, layout = _parts(run, devices)
    state = layouts.abstract(layout, lambda: make_state(model, optimizer, 0))
    step = make_train_step(model, optimizer, run, layout)
    return step, state, abstract_batch(run, layout)


def _parts(
    run: RunConfig, devices: Sequence[Any]
) -> tuple[Transformer, optax.GradientTransformation, layouts.Layout]:
    model = Transformer(run.model, fp8.dot_general(run.precision))
    layout = layouts.make_layout(model, make_mesh(run.mesh, devices))
    return model, make_optimizer(run.optimizer, run.horizon, layout), layout


def abstract_batch(run: RunConfig, layout: layouts.Layout) -> Any:
    """Returns one optimizer step's tokens and segments, [A, B, T + 1]."""
    count = run.train.batch_size // run.train.microbatch_size
    shape = (count, run.train.microbatch_size, run.data.sequence_length + 1)
    sharding = layouts.batch_sharding(layout, len(shape) - 2)
    rows: Any = jax.ShapeDtypeStruct(shape, "int32", sharding=sharding)
    return Batch(rows, rows)


def device_bytes(tree: Any) -> int:
    """Returns what one device holds of a tree of abstract arrays."""
    parts = (
        jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        for x in jax.tree.leaves(tree)
    )
    return whole_bytes(list(parts))


def whole_bytes(tree: Any) -> int:
    """Returns what all of a tree of abstract arrays takes, each of them once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _peak_host_bytes() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
