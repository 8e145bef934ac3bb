"""jmoe's side of the CPU benchmarks, and the plain matmuls that bound it.

Shapes: B batch, T position, D hidden, N = B * T, E expert, F MLP dimension, X = 2 F the
gate and up halves; of a matmul, M rows, I inputs, O outputs.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax import lax

from experiments.benchmarks import gshard
from experiments.benchmarks.kernel_times import kernel_times
from experiments.benchmarks.workers import Tasks, warm_up
from experiments.benchmarks.workload import Linear, Workload
from jmoe.config import MeshConfig
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer
from jmoe.nn.moe import MoE
from jmoe.ops import fp8
from jmoe.ops.swiglu import swiglu
from jmoe.parallel import compiler
from jmoe.train.layout import born, make_layout, put_batch, run_mesh
from jmoe.train.optimizer import make_optimizer
from jmoe.train.runtime import step_after_step
from jmoe.train.state import count_parameters, make_state
from jmoe.train.step import make_train_step

ONE_DEVICE = MeshConfig()

Layer = Callable[[Any, jax.Array], jax.Array]  # of parameters and [B, T, D]

_MATMUL_CALLS = 3

# The product of a linear map and its two gradients: which two of x_MI, w_IO and dy_MO
# are multiplied, and over which dimension of each.
_MATMULS = {
    "output": ("x", "w", (1, 0)),
    "input gradient": ("dy", "w", (1, 1)),
    "weight gradient": ("x", "dy", (0, 0)),
}


def train_step(
    workload: Workload, mesh: MeshConfig = ONE_DEVICE, precision: str = "native"
) -> Tasks:
    """`step`, as scripts/train.py takes it, returns the loss; `parameters`, how many.

    AdamW after a clip by global norm, and the update of the selection bias. `kernels`
    tells what a GPU's time goes to in a step.
    """
    run = workload.run(mesh=mesh, precision=precision)
    step_after_step()  # as scripts/train.py does
    model = Transformer(run.model, fp8.dot_general(run.precision))
    layout = make_layout(model, run_mesh(run.mesh))
    optimizer = make_optimizer(run.optimizer, run.horizon, layout)
    advance = jax.jit(
        make_train_step(model, optimizer, run, layout),
        donate_argnums=0,
        compiler_options=compiler.options(layout.mesh.devices.flat[0].platform),
    )
    state = born(layout, functools.partial(make_state, model, optimizer, 0))
    tokens_BT = workload.token_ids()
    microbatches = Batch(tokens_BT[None], np.zeros_like(tokens_BT)[None])
    parameters = count_parameters(state.params, run.model)[0]

    def step() -> float:
        nonlocal state
        state, metrics = advance(state, put_batch(layout, microbatches))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    warm_up(step)
    return {
        "step": step,
        "parameters": lambda: parameters,
        "kernels": lambda: kernel_times(step),
    }


def moe_layer(workload: Workload) -> Tasks:
    """`ours` and `gshard`: forward and backward of one router with its routed experts.

    Gradients are those of the input and of every weight. `in_place`: of the experts
    alone, each on as many rows as the others, which lie ready.
    """
    layers, inputs = moe_layers(workload)

    def task(forward: Layer, *operands: Any) -> Callable[[], None]:
        run = jax.jit(functools.partial(forward_backward, forward))

        def call() -> None:
            jax.block_until_ready(run(*operands))

        warm_up(call)
        return call

    tasks = {name: task(forward, *inputs) for name, forward in layers.items()}
    params, *x_and_dy = inputs
    # As many rows as tokens have choices.
    cfg = workload.model.moe.router
    shape = cfg.num_experts, -1, workload.model.hidden_dim
    rows = [jnp.tile(x, (cfg.top_k, 1, 1)).reshape(shape) for x in x_and_dy]
    return {**tasks, "in_place": task(batched_mlp, params["experts"], *rows)}


def batched_mlp(experts: dict[str, jax.Array], x_EMD: jax.Array) -> jax.Array:
    """Each expert's SwiGLU MLP on M rows of its own."""
    gate_up_EDX = experts["gate_up"].reshape(len(x_EMD), x_EMD.shape[2], -1)
    return swiglu(x_EMD @ gate_up_EDX) @ experts["down"]


def moe_layers(workload: Workload) -> tuple[dict[str, Layer], tuple[Any, ...]]:
    """The layers by name, and what `forward_backward` takes besides."""
    cfg = dataclasses.replace(workload.model.moe, num_shared_experts=0)
    layer = MoE(cfg, workload.model.init_std)
    shape = (workload.batch, workload.length, workload.model.hidden_dim)
    x_key, dy_key, weight_key = jax.random.split(jax.random.key(0), 3)
    x_BTD = jax.random.normal(x_key, shape)
    dy_BTD = jax.random.normal(dy_key, shape)
    variables = meta.unbox(jax.jit(layer.init)(weight_key, x_BTD))
    router_state = variables["router_state"]

    def ours(params: Any, x_BTD: jax.Array) -> jax.Array:
        return layer.apply({"params": params, "router_state": router_state}, x_BTD)[0]

    def with_capacity(params: Any, x_BTD: jax.Array) -> jax.Array:
        x_ND, bias_E = x_BTD.reshape(-1, shape[-1]), router_state["router"]["bias"]
        y_ND = gshard.capacity_layer(params, bias_E, x_ND, cfg.router)
        return y_ND.reshape(shape)

    inputs = variables["params"], x_BTD, dy_BTD
    return {"ours": ours, "gshard": with_capacity}, inputs


def forward_backward(
    forward: Layer, params: Any, x_BTD: jax.Array, dy_BTD: jax.Array
) -> tuple[jax.Array, Any]:
    """The output, and the gradients of parameters and input."""
    y_BTD, backward = jax.vjp(forward, params, x_BTD)
    return y_BTD, backward(dy_BTD)


def plain_matmuls(linears: Sequence[Linear]) -> Tasks:
    """`seconds`: for each linear map, of its product and of its two gradients' each.

    Every one is a call of its own to XLA, on operands that lie ready.
    """
    functions = [_matmul_calls(linear) for linear in linears]

    def seconds() -> list[dict[str, float]]:
        return [
            {name: _median_seconds(call) for name, call in calls.items()}
            for calls in functions
        ]

    warm_up(seconds)
    return {"seconds": seconds}


def _matmul_calls(linear: Linear) -> dict[str, Callable[[], Any]]:
    shapes = {
        "x": (linear.rows, linear.inputs),
        "w": (linear.inputs, linear.outputs),
        "dy": (linear.rows, linear.outputs),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

    def call(left: str, right: str, dims: tuple[int, int]) -> Callable[[], Any]:
        contract = (((dims[0],), (dims[1],)), ((), ()))
        product = jax.jit(
            functools.partial(lax.dot_general, dimension_numbers=contract)
        )
        operands = arrays[left], arrays[right]
        return lambda: product(*operands).block_until_ready()

    return {name: call(*matmul) for name, matmul in _MATMULS.items()}


def _median_seconds(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(_MATMUL_CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
