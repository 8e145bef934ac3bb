"""One optimizer step, and one evaluation, as pure functions to jit.

Shapes: A microbatch, B sequence, T position, N = B * T, L MoE layer, E expert, D MTP
depth. A batch's rows have T + 1 tokens: inputs are the first T, targets the last T.

On a mesh, gradients are taken inside of one `jax.shard_map` over all its axes: a device
differentiates its own share of the loss, with weights gathered once, and sums over its
microbatches. Then each gradient is summed over the devices, once, of which each keeps
its part (`parallel.zero`), and the optimizer works on the parts.

The bias moves once an optimizer step, after it, from the whole batch's counts. Those
are integers and are summed as such, so neither accumulation nor recomputation nor the
mesh can change the bias's path by a bit.

A step whose loss or gradients aren't finite is told as `skipped`. If the run asks for
that (`TrainConfig.skips_steps`), it changes nothing but counters of steps. The norm of
the gradients, which clipping needs, tells it of all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jmoe.balance import load
from jmoe.balance.bias import update_rule
from jmoe.config import RunConfig
from jmoe.config.mesh import MESH_AXES
from jmoe.data.packing import Batch
from jmoe.nn.measured import to_log
from jmoe.nn.model import Transformer, read_biases, with_biases
from jmoe.parallel import collectives, reductions
from jmoe.parallel.mesh import BATCH_AXES
from jmoe.train import accumulated, pipelined, schedules
from jmoe.train.layout import WHOLE, Layout, on_mesh
from jmoe.train.losses import normalisers, sum_losses
from jmoe.train.state import TrainState

TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
EvalStep = Callable[[Any, Any, Batch], "Evaluation"]


class Evaluation(NamedTuple):
    """Sums over a batch, to be added up: nats, targets (float32), counts (int32)."""

    loss: jax.Array
    tokens: jax.Array
    load_LE: jax.Array


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    run: RunConfig,
    layout: Layout,
) -> TrainStep:
    """Returns a function of the state and a batch of [A, B, T + 1], laid out so.

    It may be given a third argument, a float32 scalar: a step whose loss is above it
    isn't taken either.
    """
    cfg, steps = run.model, run.horizon
    bias_rule = update_rule(cfg.moe.router.update_rule)
    bias_rate = schedules.stepwise(run.train.bias_rate, steps)
    bias_rates = schedules.bias_rates(run.train, cfg.moe_layer_names, steps)
    learning_rate = schedules.learning_rate(run.optimizer.schedule, steps)
    gradients_of = _way_through(run).make_gradients(model, run, layout)

    def measure(params, router_state, step, batch):
        """Returns the batch's gradients, losses and measures, from a device's part."""
        gradients, losses, measured = gradients_of(params, router_state, step, batch)
        of_all = reductions.over_devices(measured, MESH_AXES)
        return gradients, sum_losses(losses), of_all

    measure = on_mesh(
        measure,
        layout,
        (layout.stored, WHOLE, WHOLE, PartitionSpec(None, BATCH_AXES)),
        (layout.stored, WHOLE, WHOLE),
    )

    def train_step(
        state: TrainState, batch: Batch, loss_limit: jax.Array | None = None
    ):
        gradients, losses, measured = measure(
            state.params, state.router_state, state.step, batch
        )
        counts = measured.load
        grad_norm = optax.tree.norm(gradients)
        is_taken = jnp.isfinite(losses.main) & jnp.isfinite(grad_norm)
        if loss_limit is not None:
            is_taken &= losses.main <= loss_limit
        old_bias_LE = read_biases(state.router_state, cfg)
        bias_LE = bias_rule(
            old_bias_LE,
            counts.load_E,
            rate=bias_rates(state.step),
            margin_EM=counts.margin_EM,
        )
        if run.train.skips_steps:
            bias_LE = jnp.where(is_taken, bias_LE, old_bias_LE)

        def update(params: Any, opt_state: Any) -> tuple[Any, Any]:
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        if run.train.skips_steps:
            # Not element by element: a parameter's update is computed from new moments,
            # and if these were a choice, old and new ones would take memory.
            params, opt_state = jax.lax.cond(
                is_taken, update, _keep, state.params, state.opt_state
            )
        else:
            params, opt_state = update(state.params, state.opt_state)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            router_state=with_biases(state.router_state, bias_LE, cfg),
            opt_state=opt_state,
        )
        metrics = {
            "loss": losses.main,
            "grad_norm": grad_norm,
            "skipped": jnp.int32(~is_taken),
            "learning_rate": learning_rate(state.step),
            "bias_rate": bias_rate(state.step),
            "load_LE": counts.load_E,
            "bias_LE": bias_LE,
            "max_vio": load.max_violation(counts.load_E),
        }
        dropped_L = counts.dropped_sending + counts.dropped_receiving
        per_layer = load.load_metrics(counts.load_E, dropped_L)
        metrics |= {f"{name}_L": value_L for name, value_L in per_layer.items()}
        if cfg.mtp_depth:
            metrics["mtp_loss"] = losses.mtp_D
        metrics |= {name: loss.value for name, loss in losses.layers.items()}
        metrics |= to_log(measured.metrics)
        return new_state, metrics

    return train_step


def _keep(params: Any, opt_state: Any) -> tuple[Any, Any]:
    """Returns both as they are, but schedules count the step: values follow from it."""

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    def leaf(x: Any) -> Any:
        return x._replace(count=x.count + 1) if is_schedule(x) else x

    return params, jax.tree.map(leaf, opt_state, is_leaf=is_schedule)


def _way_through(run: RunConfig) -> Any:
    """Returns how microbatches go through layers: one by one, or as in a pipeline."""
    return pipelined if run.mesh.pipe > 1 else accumulated


def make_eval_step(model: Transformer, run: RunConfig, layout: Layout) -> EvalStep:
    """Returns a function of params, router_state and a batch of [B, T + 1] tokens."""
    losses_of = _way_through(run).make_losses(model, run, layout)

    def eval_step(params: Any, router_state: Any, batch: Batch) -> Evaluation:
        losses, measured = losses_of(params, router_state, batch)
        targets = normalisers(batch, run).targets[0]
        load_LE = collectives.psum(measured.load.load_E, MESH_AXES)
        return Evaluation(sum_losses(losses).main * targets, targets, load_LE)

    in_specs = (layout.stored, WHOLE, PartitionSpec(BATCH_AXES))
    return on_mesh(eval_step, layout, in_specs, WHOLE)
