"""Compiles a decoder's step for a mesh of GPUs that aren't there, as `aot` does.

Shapes are those of `jmoe.decode.batch`.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from jmoe.decode import on_mesh
from jmoe.decode.live import make_nobody
from jmoe.parallel.mesh import make_mesh
from jmoe.plan import aot, traffic
from jmoe.plan.aot import Allocated
from jmoe.plan.device import H20, Device
from jmoe.plan.programs import Decoding
from jmoe.plan.traffic import Collective

_KERNEL = re.compile(r'custom_call_target="mosaic_gpu[^\n]*/latent_decode/')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingMemory(Allocated):
    """Bytes on one device while a decoder's step runs.

    page_array: a layer's part of the cache.
    """

    weights: int
    cache: int
    page_array: int

    @property
    def total(self) -> int:
        # A step that makes no drafts isn't given what makes them, which stays here.
        held = max(self.arguments, self.weights + self.cache)
        return held + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingSummary:
    """A compiled step, for one device.

    kernels: calls of those that attend to latents.
    """

    decoding: Decoding
    device: Device
    memory: DecodingMemory
    collectives: Sequence[Collective]
    kernels: int
    seconds: float
    host_bytes: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.memory_bytes

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Returns how often each kind of collective runs in a step, and bytes sent.

        A device that has no layer for a row, or draws no tokens, has fewer.
        """
        found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
        for c in self.collectives:
            times, sent = found[c.kind]
            found[c.kind] = times + c.times, sent + c.times * c.moved_bytes
        return dict(found)

    def large_gathers(self) -> list[Collective]:
        """Returns all-gathers that bring more than hidden states of a step's tokens."""
        cfg = self.decoding.run.model
        tokens = self.decoding.tokens + self.decoding.run.mesh.tensor  # made to divide
        hidden = tokens * cfg.hidden_dim * {"float32": 4, "bfloat16": 2}[cfg.dtype]
        return [
            c
            for c in self.collectives
            if c.kind == "all-gather" and c.operand_bytes * c.devices > hidden
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as JSON has it, without the single collectives."""
        decoding = self.decoding
        return {
            "mesh": dict(decoding.run.mesh.shape),
            "weights": decoding.form,
            "rows": decoding.rows,
            "drafts": decoding.limits.drafts,
            "chunk": decoding.chunk,
            "positions": decoding.positions,
            "device": self.device.name,
            "device_bytes": self.device.memory_bytes,
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total},
            "fits": self.fits,
            "traffic": {
                kind: {"times": times, "sent_bytes": sent}
                for kind, (times, sent) in self.traffic().items()
            },
            "kernels": self.kernels,
            "compile_seconds": self.seconds,
            "host_bytes": self.host_bytes,
        }


def compile_step(decoding: Decoding, devices: Sequence[Any]) -> aot.Program:
    """Compiles the step for the run's mesh, made of `devices`."""
    start = aot.now()
    run, limits = decoding.run, decoding.limits
    mesh = make_mesh(run.mesh, devices)
    exchange = on_mesh.with_room_for_all(run)
    programs = on_mesh.compile_for(run, mesh, decoding.form, limits, exchange)
    parts = run.mesh.batch_parts
    given = make_nobody(limits, parts, decoding.size)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    weights, state, *others = programs.abstract(shapes)

    def memory(**sizes: int) -> DecodingMemory:
        pages = jax.tree.leaves((state.layers, state.mtp))
        return DecodingMemory(
            weights=aot.device_bytes(weights),
            cache=aot.device_bytes(pages),
            page_array=aot.device_bytes(pages[0]),
            **sizes,
        )

    lowered = programs.step.lower(weights, state, *others)
    return aot.compile_lowered(lowered, memory, devices, start)


def summarise(
    decoding: Decoding, device: Device, program: aot.Program
) -> DecodingSummary:
    """Returns what the compiled step says."""
    return DecodingSummary(
        decoding=decoding,
        device=device,
        memory=program.memory,
        collectives=traffic.collectives(program.text, decoding.run.mesh.shape),
        kernels=len(_KERNEL.findall(program.text)),
        seconds=program.seconds,
        host_bytes=program.host_bytes,
    )


def compile_decoding(decoding: Decoding, device: Device = H20) -> DecodingSummary:
    """Compiles the step for as many of `device` as its mesh has."""
    devices = aot.absent_devices(device, decoding.run.mesh.num_devices)
    return summarise(decoding, device, compile_step(decoding, devices))
