"""All that a run must remember between two steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jmoe.config import ModelConfig
from jmoe.nn.model import Transformer, make_variables, parameter_records
from jmoe.nn.parameter import Parameter


@struct.dataclass
class TrainState:
    """One pytree; `router_state` holds the biases, which no optimizer sees.

    step: int32, optimizer steps done. params: float32.
    """

    step: jax.Array
    params: Any
    router_state: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The model's collections, as `Transformer.apply` takes them."""
        return {"params": self.params, "router_state": self.router_state}


def make_state(
    model: Transformer, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Makes a new model's state; jit or `eval_shape` it."""
    variables = make_variables(model, seed)
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        router_state=variables["router_state"],
        opt_state=optimizer.init(variables["params"]),
    )


def require_step(state: TrainState, step: int, where: Any) -> None:
    """Refuses a state of another step than its checkpoint is named by.

    A checkpoint's sums say that nothing has changed since they were made; whoever
    copies one under another step's name can make them again.

    Args:
      where: it was read from; named in the error.

    Raises:
      ValueError: names both steps.
    """
    found = int(jax.device_get(state.step))
    if found != step:
        raise ValueError(
            f"{where} is named by step {step}, but the state in it is of step {found}: "
            "move it away to go on from an older one."
        )


def count_parameters(params: Any, cfg: ModelConfig) -> tuple[int, int]:
    """Returns how many parameters there are, and how many one token meets.

    A token meets `top_k` of the routed experts, and of a table one row, which isn't
    counted.
    """
    router = cfg.moe.router
    records = parameter_records(cfg)["params"]

    def met(record: Parameter, x: Any) -> int:
        if record.is_table:
            return 0
        if record.of_experts:
            return x.size * router.top_k // router.num_experts
        return x.size

    total = sum(x.size for x in jax.tree.leaves(params))
    return total, sum(jax.tree.leaves(jax.tree.map(met, records, params)))
