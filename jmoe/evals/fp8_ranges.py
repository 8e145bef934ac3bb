"""How much of each tensor e4m3's range loses when a model trains in FP8.

A forward and a backward pass look at what is quantized for each product: activations,
weights, and gradients. Two fractions tell whether blocks and scales suit them:

    flushed     of the numbers other than zero, those that become zero
    saturated   of all numbers, those that become 448, the largest that e4m3 has

Scales are from the numbers at hand, so nothing is beyond 448. A block's largest number
becomes that, and those within 1/28 of it: 0.8% at least, of a block of 128. Where
scales are powers of two (of what is after attention or comes to the experts, or as the
recipe says), few blocks have any.

Modules are watched as they are called (Linen's method interception); none of them has
code for it. Counts leave the compiled passes by callbacks, so that layers in a scan are
counted too, as one tensor.

Shapes: N token, D hidden, K choice of a token, R row (one choice of one token), E
expert, F MLP dimension.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from jmoe.config.model import ROUTERS
from jmoe.data.loader import validation_batches
from jmoe.nn.choices import Routing
from jmoe.nn.linear import Linear
from jmoe.nn.mixers import MIXERS
from jmoe.nn.model import Transformer
from jmoe.nn.moe import RoutedExperts, SwiGLU
from jmoe.ops import fp8
from jmoe.ops.rows import DOT, sort_rows
from jmoe.ops.swiglu import swiglu
from jmoe.train.losses import make_objective, microbatch_losses, normalisers
from jmoe.train.microbatch import Microbatch
from jmoe.train.trained import Trained


class Fractions(NamedTuple):
    """Counts numbers of one tensor, or of that of all layers of a scan."""

    flushed: float
    saturated: float


def fp8_ranges(trained: Trained) -> dict[str, dict[str, Fractions]]:
    """Returns `{module: {tensor: Fractions}}` for the validation text's first batch.

    Tensors are x, w and dy of linear layers and routed experts, and what is between
    experts' products: h, which is kept for the backward pass, its gradient dh, and act.

    Raises:
      ValueError: the run's `precision` isn't an FP8 one, or its experts choose.
    """
    run = trained.run
    if run.precision not in fp8.RECIPES:
        known = ", ".join(fp8.RECIPES)
        raise ValueError(f"precision={run.precision!r} is not FP8, one of {known}.")
    kind = run.model.moe.router.kind
    if ROUTERS[kind].by_experts:
        raise ValueError(
            f"model.moe.router.kind={kind!r} has experts choose; what FP8 loses is "
            "measured where tokens do."
        )
    (batch,) = validation_batches(
        run.data,
        trained.tokenizer,
        batch_size=run.train.microbatch_size,
        num_batches=1,
    )
    model = Transformer(run.model, fp8.dot_general(run.precision))
    objective = make_objective(run)
    tally = Tally(fp8.RECIPES[run.precision])

    def loss(params, router_state, batch):
        with nn.intercept_methods(tally.intercept):
            norms, part = normalisers(batch, run), Microbatch(batch)
            losses, _ = microbatch_losses(model, params, router_state, part, run, norms)
        return objective(losses, jnp.int32(trained.step))

    variables = trained.variables["params"], trained.variables["router_state"]
    jax.block_until_ready(jax.jit(jax.grad(loss))(*variables, batch))
    jax.effects_barrier()
    return tally.fractions()


class Tally:
    """Counts what quantizing does to the operands of a model's products."""

    def __init__(self, recipe: fp8.Recipe):
        self.recipe = recipe
        self.counts: dict[tuple[str, str], np.ndarray] = collections.defaultdict(
            lambda: np.zeros(4, np.int64)
        )

    def fractions(self) -> dict[str, dict[str, Fractions]]:
        found: dict[str, dict[str, Fractions]] = {}
        for (module, tensor), counts in sorted(self.counts.items()):
            flushed, others, saturated, total = counts.tolist()
            fractions = Fractions(flushed / max(others, 1), saturated / max(total, 1))
            found.setdefault(module, {})[tensor] = fractions
        return found

    def intercept(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any):
        """Counts what a linear layer multiplies; for `nn.intercept_methods`."""
        watched = {Linear: self._linear, RoutedExperts: self._experts}
        watch = watched.get(type(context.module))
        if watch is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        return watch(context.module, call, *args)

    def _linear(self, module: Linear, call, x: jax.Array) -> jax.Array:
        name = "/".join(module.path)
        multiplied = x
        if isinstance(module.parent, SwiGLU) and module.name == "down":
            h = x.reshape(*x.shape[:-2], -1)
            self._see(name, "h", h, fp8.ROW)
            multiplied = swiglu(h)
        mixers = [mixer.module for mixer in MIXERS.values()]
        is_after_attention = type(module.parent) in mixers and module.name == "out"
        self._see(
            name,
            "x",
            multiplied,
            self.recipe.activations,
            power_of_two=is_after_attention,
        )
        w = module.variables["params"]["kernel"]
        self._see(name, "w", w.reshape(w.shape[0], -1), self.recipe.weights)
        return self._see_gradient(name, "dy", call(x))

    def _experts(self, module: RoutedExperts, call, x_BSD, routing: Routing):
        name = "/".join(module.path)
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        expert_NK, gate_NK = routing
        weights = module.variables["params"]
        gate_up_EDX = weights["gate_up"].reshape(*weights["gate_up"].shape[:2], -1)
        down_EFD = weights["down"]
        self._see(name, "x", x_ND, self.recipe.activations, power_of_two=True)
        self._see(name, "w", gate_up_EDX, self.recipe.weights)
        self._see(name, "w", down_EFD, self.recipe.weights)

        exchanged = call(x_BSD, routing)
        rows = sort_rows(expert_NK, down_EFD.shape[0], spare=0)
        gate_R1 = gate_NK.reshape(-1)[rows.choice_N][:, None]
        h_RX = _ragged_dot(x_ND[rows.token_N], gate_up_EDX, rows.size_E)
        self._see(name, "h", h_RX, fp8.ROW)
        act_RF = swiglu(self._see_gradient(name, "dh", h_RX))
        self._see(name, "act", act_RF, self.recipe.activations)
        y_RD = gate_R1 * _ragged_dot(act_RF, down_EFD, rows.size_E)
        y_ND = jnp.zeros(x_ND.shape, jnp.float32).at[rows.token_N].add(y_RD)
        # The experts' own loops hide what is between their products. So their result is
        # given the gradient of one that is computed here, in float32.
        y_ND = y_ND.astype(x_ND.dtype)
        y_ND += lax.stop_gradient(exchanged.y_ND - y_ND)
        return exchanged._replace(y_ND=self._see_gradient(name, "dy", y_ND))

    def _see(
        self,
        module: str,
        tensor: str,
        x: jax.Array,
        block: fp8.Block,
        *,
        power_of_two: bool = False,
    ) -> None:
        add = functools.partial(self._add, module, tensor)
        power_of_two |= self.recipe.power_of_two
        counts = count(lax.stop_gradient(x), block, power_of_two=power_of_two)
        jax.debug.callback(add, counts)

    def _see_gradient(self, module: str, tensor: str, y: jax.Array) -> jax.Array:
        def see(dy):
            self._see(module, tensor, dy, self.recipe.gradients)

        return _watched(see, y)

    def _add(self, module: str, tensor: str, counts: np.ndarray) -> None:
        self.counts[module, tensor] += counts


def count(x: jax.Array, block: fp8.Block, *, power_of_two: bool = False) -> jax.Array:
    """Returns int32 [4]: flushed, others than zero, saturated, all numbers of x."""
    data = fp8.quantize(x, block, power_of_two=power_of_two).data.astype(jnp.float32)
    is_other = x != 0
    of_each = (is_other & (data == 0), is_other, jnp.abs(data) == fp8.LARGEST)
    return jnp.stack([*(x.sum(dtype=jnp.int32) for x in of_each), jnp.int32(x.size)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched(see: Callable[[jax.Array], None], y: jax.Array) -> jax.Array:
    """Returns y, whose gradient is shown to `see`."""
    return y


def _watched_bwd(see, _, dy):
    see(dy)
    return (dy,)


_watched.defvjp(lambda see, y: (y, None), _watched_bwd)


def _ragged_dot(x_RI: jax.Array, w_EIO: jax.Array, size_E: jax.Array) -> jax.Array:
    x_RI, w_EIO = x_RI.astype(jnp.float32), w_EIO.astype(jnp.float32)
    return lax.ragged_dot_general(x_RI, w_EIO, size_E, DOT)
