"""One MoE layer, forward and backward, compiled for GPUs that aren't there.

A training step's program has much besides; here is what one way to exchange tokens
costs against another.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.config import RunConfig
from jmoe.nn.moe import MoE
from jmoe.nn.parameter import records
from jmoe.ops import fp8
from jmoe.parallel import rules
from jmoe.parallel.mesh import BATCH_AXES, make_mesh
from jmoe.plan import aot, summary
from jmoe.plan.aot import Memory
from jmoe.plan.device import H20, Device
from jmoe.plan.summary import Summary


def compile_layer(run: RunConfig, device: Device = H20) -> Summary:
    """Compiles an MoE layer of the run's model, its output and all its gradients.

    Weights and tokens are bfloat16. Each part of the batch has one sequence.

    Raises:
      ValueError: JAX's CUDA plugin, which compiles for GPUs, isn't installed.
    """
    devices = aot.absent_devices(device, run.mesh.num_devices)
    start = aot.now()
    function, params, *others = _layer(run, devices)
    memory = functools.partial(
        Memory,
        parameters=aot.device_bytes(params),
        optimizer=0,
        parameters_even=aot.whole_bytes(params) / len(devices),
        optimizer_even=0.0,
    )
    lowered = function.lower(params, *others)
    program = aot.compile_lowered(lowered, memory, devices, start)
    return summary.summarise(run, device, program)


def _layer(run: RunConfig, devices: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the compilable layer, and its abstract arguments, the weights first."""
    mesh = make_mesh(run.mesh, devices)
    cfg = run.model
    layer = MoE(cfg.moe, cfg.init_std, fp8.dot_general(run.precision))
    shape = (run.mesh.batch_parts, run.data.sequence_length, cfg.hidden_dim)
    x_BTD = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x_BTD)
    of_tokens = PartitionSpec(BATCH_AXES, "tensor")
    of_params = rules.specs(boxed["params"], mesh.shape)
    params, state = meta.unbox(boxed["params"]), meta.unbox(boxed["router_state"])
    of_state = jax.tree.map(lambda _: PartitionSpec(), state)

    def on_device(params, router_state, x_BTD, dy_BTD):
        def apply(params, x_BTD):
            variables = {"params": params, "router_state": router_state}
            return layer.apply(variables, x_BTD)

        y_BTD, pull, measured = jax.vjp(apply, params, x_BTD, has_aux=True)
        return y_BTD, *pull(dy_BTD), measured

    specs = of_params, of_state, of_tokens, of_tokens
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=specs,
        out_specs=(of_tokens, of_params, of_tokens, PartitionSpec()),
        check_vma=False,
    )

    def placed(x: Any, spec: PartitionSpec, record: Any = None) -> Any:
        narrow = record is not None and not record.in_float32
        dtype = jnp.bfloat16 if narrow else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(placed, params, of_params, records(boxed["params"]))
    state = jax.tree.map(placed, state, of_state)
    tokens = placed(x_BTD, of_tokens)
    return jax.jit(mapped), params, state, tokens, tokens
