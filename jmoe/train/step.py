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
from jmoe.nn.model import Transformer, read_biases, write_biases
from jmoe.nn.router import Stats
from jmoe.parallel import collectives
from jmoe.parallel.mesh import BATCH_AXES
from jmoe.parallel.vocabulary import linear_cross_entropy
from jmoe.train import schedules
from jmoe.train.layout import WHOLE, Layout
from jmoe.train.state import TrainState
from jmoe.train.weights import gather_weights, reduce_gradients, with_gathers

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
EvalStep = Callable[[Any, Any, Batch], "Evaluation"]


class Losses(NamedTuple):
    """Float32 means in nats a token; `auxiliary` is unweighted, summed over layers."""

    main: jax.Array
    mtp_D: jax.Array
    auxiliary: jax.Array


class Evaluation(NamedTuple):
    """Sums over a batch, to be added up: nats, tokens (float32), counts (int32)."""

    loss: jax.Array
    tokens: jax.Array
    load_LE: jax.Array


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    run: RunConfig,
    layout: Layout,
) -> TrainStep:
    """A function of the state and a batch of [A, B, T + 1] tokens, laid out so."""
    model = with_gathers(model, run, layout)
    cfg, steps = run.model, run.train.steps
    bias_rule = update_rule(cfg.moe.router.update_rule)
    bias_rate = schedules.stepwise(run.train.bias_rate, steps)
    mtp_weight = schedules.stepwise(run.train.mtp_weight, steps)
    learning_rate = schedules.learning_rate(run.optimizer.schedule, steps)

    def objective(params, router_state, step, batch):
        losses, stats = microbatch_losses(model, params, router_state, batch, run)
        total = losses.main + cfg.moe.router.auxiliary_weight * losses.auxiliary
        if cfg.mtp_depth:
            total += mtp_weight(step) * losses.mtp_D.mean()
        return total, (losses, stats)

    def measure(params, router_state, step, batch):
        """Gradients, losses and stats of the batch, from this device's part of it."""
        weights = gather_weights(params, layout, run)
        gradients, losses, stats = accumulate(
            lambda part: jax.grad(objective, has_aux=True)(
                weights, router_state, step, part
            ),
            batch,
        )
        gradients = reduce_gradients(gradients, layout, run)
        return gradients, sum_losses(losses), collectives.total(stats, MESH_AXES)

    measure = on_mesh(
        measure,
        layout,
        (layout.stored, WHOLE, WHOLE, PartitionSpec(None, BATCH_AXES)),
        (layout.stored, WHOLE, WHOLE),
    )

    def train_step(state: TrainState, batch: Batch):
        gradients, losses, stats = measure(
            state.params, state.router_state, state.step, batch
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = bias_rate(state.step)
        bias_LE = bias_rule(
            read_biases(state.router_state, cfg),
            stats.load_E,
            rate=rate,
            margin_EM=stats.margin_EM,
        )
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            router_state=write_biases(bias_LE, cfg),
            opt_state=opt_state,
        )
        metrics = {
            "loss": losses.main,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": learning_rate(state.step),
            "bias_rate": rate,
            "load_LE": stats.load_E,
            "bias_LE": bias_LE,
            "max_vio": load.max_violation(stats.load_E),
        }
        dropped_L = stats.dropped_sending + stats.dropped_receiving
        per_layer = load.load_metrics(stats.load_E, dropped_L)
        metrics |= {f"{name}_L": value_L for name, value_L in per_layer.items()}
        if cfg.mtp_depth:
            metrics["mtp_loss"] = losses.mtp_D
        if cfg.moe.router.auxiliary_loss != "none":
            metrics["aux_loss"] = losses.auxiliary
        return new_state, metrics

    return train_step


def on_mesh(
    function: Callable[..., Any], layout: Layout, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """A function of whole arrays, from one of a device's parts of them."""
    if layout.mesh.size == 1:
        return function
    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


def sum_losses(losses: Losses) -> Losses:
    """Of all devices' shares. Those of `tensor` have the loss of the same tokens."""
    return Losses(
        main=collectives.total(losses.main, BATCH_AXES),
        mtp_D=collectives.total(losses.mtp_D, BATCH_AXES),
        auxiliary=collectives.total(losses.auxiliary, MESH_AXES),
    )


def accumulate(
    grad: Callable[[Batch], tuple[Any, tuple[Losses, Stats]]], batch: Batch
) -> tuple[Any, Losses, Stats]:
    """Mean gradients (float32), losses, and summed stats, over the microbatches."""

    def grad_float32(part):
        gradients, measured = grad(part)
        return jax.tree.map(lambda x: x.astype(jnp.float32), gradients), measured

    count = batch.tokens_BT.shape[0]
    if count == 1:
        gradients, (losses, stats) = grad_float32(jax.tree.map(lambda x: x[0], batch))
        return gradients, losses, stats

    def add(total, part):
        return jax.tree.map(jnp.add, total, grad_float32(part)), None

    first = jax.eval_shape(grad_float32, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    (gradients, (losses, stats)), _ = jax.lax.scan(add, zeros, batch)
    gradients, losses = jax.tree.map(lambda x: x / count, (gradients, losses))
    return gradients, losses, stats


def microbatch_losses(
    model: Transformer, params: Any, router_state: Any, batch: Batch, run: RunConfig
) -> tuple[Losses, Stats]:
    """This device's share of a microbatch's losses, and its stats.

    Args:
      batch: this device's sequences, [B, T + 1] tokens.
    """
    tokens_BT, segment_BT = batch
    features: Any = model.apply(
        {"params": params, "router_state": router_state},
        tokens_BT[:, :-1],
        segment_BT[:, :-1] if run.data.segment_masks else None,
        method="features",
    )

    def loss(hidden_BSD, depth):
        """Of predicting, at position t, token t + 1 + depth."""
        target_BT = jnp.roll(tokens_BT, -1 - depth, axis=1)[:, :-1]
        length = target_BT.shape[1]
        weight_T = (jnp.arange(length) < length - depth).astype(jnp.float32)
        weight_BT = jnp.broadcast_to(weight_T, target_BT.shape)
        weight_BT /= weight_BT.sum() * collectives.axis_size(BATCH_AXES)
        total: jax.Array = linear_cross_entropy(
            hidden_BSD.reshape(-1, hidden_BSD.shape[-1]),
            features.head_DV,
            collectives.part(target_BT, "tensor", 1).reshape(-1),
            collectives.part(weight_BT, "tensor", 1).reshape(-1),
            run.train.loss_chunk,
        )
        return total

    mtp = [loss(hidden_BSD, k) for k, hidden_BSD in enumerate(features.mtp_BSD, 1)]
    losses = Losses(
        main=loss(features.hidden_BSD, 0),
        mtp_D=jnp.stack(mtp) if mtp else jnp.zeros(0),
        auxiliary=features.stats.auxiliary_loss.sum(),
    )
    return losses, features.stats


def make_eval_step(model: Transformer, run: RunConfig, layout: Layout) -> EvalStep:
    """A function of params, router_state and a batch of [B, T + 1] tokens."""
    model = with_gathers(model, run, layout)

    def eval_step(params: Any, router_state: Any, batch: Batch) -> Evaluation:
        weights = gather_weights(params, layout, run)
        losses, stats = microbatch_losses(model, weights, router_state, batch, run)
        devices = collectives.axis_size(BATCH_AXES)
        tokens = jnp.float32(batch.tokens_BT[:, 1:].size * devices)
        load_LE = collectives.total(stats.load_E, MESH_AXES)
        return Evaluation(sum_losses(losses).main * tokens, tokens, load_LE)

    in_specs = (layout.stored, WHOLE, PartitionSpec(BATCH_AXES))
    return on_mesh(eval_step, layout, in_specs, WHOLE)
