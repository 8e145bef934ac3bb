"""What it costs to plan loans of experts, on a GPU that isn't there.

A plan (`jmoe.balance.lending`) is a few small kernels, whose time is that of their
launches. It is held against the floor of the layer that it is made for: its matrix
products, forward and backward, at the GPU's full rate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.balance import lending
from jmoe.config import RunConfig
from jmoe.parallel import balanced
from jmoe.plan import aot, hlo
from jmoe.plan.device import H20, Device

LAUNCH_SECONDS = 3e-6  # from one kernel's end to the end of an empty one after it


class PlanCost(NamedTuple):
    """One plan's kernels, their bytes and time, and its layer's least time.

    moved_bytes: what kernels read and write, each of its operands once. floor_seconds:
    of the products of a device's even share of rows, and of its shared experts'.
    """

    kernels: int
    moved_bytes: int
    seconds: float
    floor_seconds: float


def plan_cost(run: RunConfig, device: Device = H20) -> PlanCost:
    """Returns what a plan costs for the run's MoE layer on its `expert` axis.

    Raises:
      ValueError: JAX's CUDA plugin, which compiles for GPUs, isn't installed.
    """
    program = hlo.parse(_compiled(run, device))
    kernels = program.kernels()
    sizes = {
        x.name: hlo.shape_bytes(x.shape) for x in program.computations[program.entry]
    }
    moved = sum(
        sizes[name] for kernel in kernels for name in (kernel.name, *kernel.operands)
    )
    return PlanCost(
        len(kernels),
        moved,
        len(kernels) * LAUNCH_SECONDS + moved / device.memory_bandwidth,
        _layer_flops(run) / device.bfloat16_flops,
    )


def _compiled(run: RunConfig, device: Device) -> str:
    router, cfg = run.model.moe.router, run.model.moe.exchange
    peers = run.mesh.expert
    mesh = Mesh(np.array(aot.absent_devices(device, 1)), ("device",))
    load_PE = jax.ShapeDtypeStruct(
        (peers, router.num_experts),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec()),
    )

    def plan(load_PE: jax.Array) -> lending.LendingPlan:
        slots = balanced.num_slots(cfg, router, peers)
        return lending.plan(load_PE, slots, cfg.lend_above, cfg.node_size)

    compiled: Any = jax.jit(plan).lower(load_PE).compile()
    return compiled.as_text()


def _layer_flops(run: RunConfig) -> float:
    """Returns a device's in one layer's products, forward and backward."""
    moe = run.model.moe
    rows = run.data.sequence_length * (moe.router.top_k + moe.num_shared_experts)
    matrices = 3 * run.model.hidden_dim * moe.expert_mlp_dim / run.mesh.tensor
    passes = 3  # the backward pass has two products for each of the forward's
    return 2.0 * rows * matrices * passes
