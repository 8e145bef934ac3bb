"""All that a run must remember between two steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.core import meta

from jmoe.config import RouterConfig
from jmoe.nn.model import Transformer


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


def init_variables(model: Transformer, seed: int) -> Any:
    """A new model's collections, in Linen's boxes that name their dimensions."""
    return model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))


def make_variables(model: Transformer, seed: int) -> dict[str, Any]:
    """A new model's `params` and `router_state`; jit or `eval_shape` it."""
    return meta.unbox(init_variables(model, seed))


def make_state(
    model: Transformer, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """A new model's state; jit or `eval_shape` it."""
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


def count_parameters(params: Any, router: RouterConfig) -> tuple[int, int]:
    """All parameters, and those that one token meets on its way.

    A token meets `top_k` of the routed experts, and of the input embedding one row,
    which isn't counted.
    """
    total = active = 0
    for path, x in jax.tree.leaves_with_path(params):
        names = [key.key for key in path]
        total += x.size
        if names[-1] == "embedding" and "head" in params:
            continue
        routed = "experts" in names
        active += x.size * router.top_k // router.num_experts if routed else x.size
    return total, active
