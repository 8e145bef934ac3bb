"""What a compiled step says of itself: does it fit, what does it move, what hides it.

Compiling takes memory, some of which a process keeps; so that one program's peak isn't
another's, each is compiled in a process of its own.
"""

import collections
import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jmoe.balance import dropping
from jmoe.config import RunConfig
from jmoe.parallel.mesh import BATCH_AXES
from jmoe.plan import aot, copies, traffic
from jmoe.plan.aot import Memory
from jmoe.plan.device import H20, Device
from jmoe.plan.traffic import Collective

SMALL = 2**16

R = TypeVar("R")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """The collectives of one phase, kind and axes; numbers are of one step."""

    phase: str
    kind: str
    axes: tuple[str, ...]
    times: int
    sent_bytes: int  # by one device
    hidden: float  # the share of `times` that spans a matrix product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """One program, for one device.

    copied_bytes: of the largest array that a loop copies as it is.
    """

    run: RunConfig
    device: Device
    memory: Memory
    collectives: Sequence[Collective]
    copied_bytes: int
    seconds: float
    cpu_seconds: float
    host_bytes: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.memory_bytes

    def traffic(self) -> list[Traffic]:
        """Returns all collectives, the heaviest first within a phase."""
        groups: dict[Any, list[Collective]] = collections.defaultdict(list)
        for collective in self.collectives:
            key = collective.phase, collective.kind, collective.axes
            groups[key].append(collective)
        rows = [
            Traffic(
                phase=phase,
                kind=kind,
                axes=axes,
                times=sum(c.times for c in group),
                sent_bytes=sum(c.times * c.moved_bytes for c in group),
                hidden=hidden(group),
            )
            for (phase, kind, axes), group in groups.items()
        ]
        order = {phase: place for place, phase in enumerate(traffic.PHASES)}
        return sorted(rows, key=lambda row: (order[row.phase], -row.sent_bytes))

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as JSON has it, without the single collectives."""
        return {
            "mesh": dict(self.run.mesh.shape),
            "sequences": self.run.train.batch_size,
            "sequence_length": self.run.data.sequence_length,
            "device": self.device.name,
            "device_bytes": self.device.memory_bytes,
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total},
            "fits": self.fits,
            "traffic": [dataclasses.asdict(row) for row in self.traffic()],
            "copied_bytes": self.copied_bytes,
            "compile_seconds": self.seconds,
            "compile_cpu_seconds": self.cpu_seconds,
            "host_bytes": self.host_bytes,
        }


def hidden(collectives: Sequence[Collective]) -> float:
    """Returns the share of them that spans a matrix product.

    Each counts as often as it runs.
    """
    times = sum(c.times for c in collectives)
    return sum(c.times for c in collectives if c.gemms) / times if times else math.nan


def summarise(run: RunConfig, device: Device, program: aot.Program) -> Summary:
    """Returns what the compiled step of `run` says."""
    return Summary(
        run=run,
        device=device,
        memory=program.memory,
        collectives=traffic.collectives(program.text, run.mesh.shape),
        copied_bytes=copies.largest_in_loops(program.text),
        seconds=program.seconds,
        cpu_seconds=program.cpu_seconds,
        host_bytes=program.host_bytes,
    )


def compile_run(run: RunConfig, device: Device = H20) -> Summary:
    """Compiles the training step of `run` for as many of `device` as it needs."""
    devices = aot.absent_devices(device, run.mesh.num_devices)
    return summarise(run, device, aot.compile_step(run, devices))


def compile_optimizer(run: RunConfig, device: Device = H20) -> Summary:
    """Compiles the optimizer's part of the step of `run` alone."""
    devices = aot.absent_devices(device, run.mesh.num_devices)
    return summarise(run, device, aot.compile_optimizer(run, devices))


def held_ratio(memory: Memory) -> float:
    """Returns what a device holds at rest, over an even part.

    That is of weights, moments and gradients.

    A reduced gradient lies as its weight does, in float32 too.
    """
    held = 2 * memory.parameters + memory.optimizer
    return held / (2 * memory.parameters_even + memory.optimizer_even)


def optimizer_bytes(run: RunConfig, device: Device = H20) -> int:
    """Returns what the optimizer keeps on one device; nothing is compiled."""
    devices = aot.absent_devices(device, run.mesh.num_devices)
    _, state, _ = aot.abstract_step(run, devices)
    return aot.device_bytes(state.opt_state)


def apart(function: Callable[[R], T], run: R) -> T:
    """Returns `function(run)` of a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_mute,
    ) as pool:
        return pool.submit(function, run).result()


def _mute() -> None:
    """Hides what XLA remarks; errors come back as exceptions."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def once_a_device_bytes(run: RunConfig) -> float:
    """Returns what a device must at least send to experts in a step's forward pass.

    Each token's hidden state, in the activations' dtype, once to each of the other
    devices that it visits on average if all experts are alike, in every MoE layer.
    """
    cfg, mesh = run.model, run.mesh
    tokens = run.train.batch_size * run.data.sequence_length
    own = tokens / (mesh.batch_parts * mesh.tensor)
    visited = float(dropping.expected_visits(cfg.moe.router, mesh.expert))
    others = visited * (1 - 1 / mesh.expert)
    bytes_each = cfg.hidden_dim * {"float32": 4, "bfloat16": 2}[cfg.dtype]
    layers = cfg.num_moe_layers + cfg.mtp_depth
    return own * others * bytes_each * layers


def dispatch_ratio(summary: Summary) -> float:
    """Returns what goes to the experts, as a share of `once_a_device_bytes`.

    With a capacity, buffers' empty slots travel too.
    """
    sent = sum(
        c.times * c.moved_bytes
        for c in summary.collectives
        if c.phase == "forward" and "/dispatch/" in c.op_name
    )
    return sent / once_a_device_bytes(summary.run)


def batch_gathers(summary: Summary) -> list[Collective]:
    """Returns all-gathers in the passes over axes that divide a batch, but small ones.

    They would bring weights for every microbatch, or other devices' tokens. What is
    small is counts.
    """
    return [
        c
        for c in summary.collectives
        if c.kind == "all-gather"
        and c.phase != "step"
        and c.moved_bytes > SMALL
        and {*c.axes} & {*BATCH_AXES}
    ]


def gradient_sums(summary: Summary) -> list[Collective]:
    """Returns reductions of parameters' gradients: reduce-scatters and all-reduces.

    Devices that have other tokens have other gradients, so a gradient is reduced over
    axes that divide a batch; activations are over `tensor`, which divides positions,
    but for those of the `gather` exchange, which these programs don't have. Outside of
    the passes nothing is reduced but gradients, and what is small: counts, losses and
    norms.
    """
    return [
        c
        for c in summary.collectives
        if c.kind in ("reduce-scatter", "all-reduce")
        and (c.phase == "step" or {*c.axes} & {*BATCH_AXES})
    ]


def in_bfloat16(collectives: Sequence[Collective]) -> list[Collective]:
    """Returns which of these collectives send anything in bfloat16."""
    return [
        c for c in collectives if any(shape.startswith("bf16[") for shape in c.shapes)
    ]
