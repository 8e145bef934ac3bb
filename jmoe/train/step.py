"""One optimizer step, and one evaluation, as pure functions to jit.

Shapes: A microbatch, B sequence, T position, N = B * T, L MoE layer, E expert, D MTP
depth. A batch's rows have T + 1 tokens: inputs are the first T, targets the last T.

The bias moves once an optimizer step, after it, from the whole batch's counts. Those
are integers and are summed as such, so neither accumulation nor recomputation can
change the bias's path by a bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmoe.balance import load
from jmoe.balance.bias import update_rule
from jmoe.config import RunConfig
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer, read_biases, write_biases
from jmoe.nn.router import Stats
from jmoe.ops.loss import linear_cross_entropy
from jmoe.train import schedules
from jmoe.train.state import TrainState

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
    model: Transformer, optimizer: optax.GradientTransformation, run: RunConfig
) -> TrainStep:
    """A function of the state and a batch of [A, B, T + 1] tokens."""
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

    def train_step(state: TrainState, batch: Batch):
        gradients, losses, stats = accumulate(
            lambda part: jax.grad(objective, has_aux=True)(
                state.params, state.router_state, state.step, part
            ),
            batch,
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
        per_layer = load.load_metrics(stats.load_E, stats.dropped)
        metrics |= {f"{name}_L": value_L for name, value_L in per_layer.items()}
        if cfg.mtp_depth:
            metrics["mtp_loss"] = losses.mtp_D
        if cfg.moe.router.auxiliary_loss != "none":
            metrics["aux_loss"] = losses.auxiliary
        return new_state, metrics

    return train_step


def accumulate(
    grad: Callable[[Batch], tuple[Any, tuple[Losses, Stats]]], batch: Batch
) -> tuple[Any, Losses, Stats]:
    """Mean gradients and losses, and summed integer stats, over the microbatches."""
    count = batch.tokens_BT.shape[0]
    if count == 1:
        gradients, (losses, stats) = grad(jax.tree.map(lambda x: x[0], batch))
        return gradients, losses, stats

    def add(total, part):
        return jax.tree.map(jnp.add, total, grad(part)), None

    first = jax.eval_shape(grad, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    (gradients, (losses, stats)), _ = jax.lax.scan(add, zeros, batch)
    gradients, losses = jax.tree.map(lambda x: x / count, (gradients, losses))
    return gradients, losses, stats


def microbatch_losses(
    model: Transformer, params: Any, router_state: Any, batch: Batch, run: RunConfig
) -> tuple[Losses, Stats]:
    """Losses and stats of one microbatch of [B, T + 1] tokens."""
    tokens_BT, segment_BT = batch
    features: Any = model.apply(
        {"params": params, "router_state": router_state},
        tokens_BT[:, :-1],
        segment_BT[:, :-1] if run.data.segment_masks else None,
        method="features",
    )

    def loss(hidden_BTD, depth):
        """Of predicting, at position t, token t + 1 + depth."""
        target_BT = jnp.roll(tokens_BT, -1 - depth, axis=1)[:, :-1]
        length = target_BT.shape[1]
        weight_T = (jnp.arange(length) < length - depth).astype(jnp.float32)
        weight_BT = jnp.broadcast_to(weight_T, target_BT.shape)
        total: jax.Array = linear_cross_entropy(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            features.head_DV,
            target_BT.reshape(-1),
            weight_BT.reshape(-1) / weight_BT.sum(),
            run.train.loss_chunk,
        )
        return total

    mtp = [loss(hidden_BTD, k) for k, hidden_BTD in enumerate(features.mtp_BTD, 1)]
    losses = Losses(
        main=loss(features.hidden_BTD, 0),
        mtp_D=jnp.stack(mtp) if mtp else jnp.zeros(0),
        auxiliary=features.stats.auxiliary_loss.sum(),
    )
    return losses, features.stats


def make_eval_step(model: Transformer, run: RunConfig) -> EvalStep:
    """A function of params, router_state and a batch of [B, T + 1] tokens."""

    def eval_step(params: Any, router_state: Any, batch: Batch) -> Evaluation:
        losses, stats = microbatch_losses(model, params, router_state, batch, run)
        tokens = jnp.float32(batch.tokens_BT[:, 1:].size)
        return Evaluation(losses.main * tokens, tokens, stats.load_E)

    return eval_step
