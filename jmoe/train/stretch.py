"""Steps of a run, from a checkpoint on, and what happens between them.

The device computes, the host feeds it: batches are read ahead and a few steps are
dispatched without waiting. The host waits for all of them where it must show or store
something: at a log, an evaluation, a checkpoint.

Shapes: A microbatch, B sequence, T position, L MoE layer, E expert.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jmoe.train.step as steps
from jmoe.balance import load
from jmoe.config import RunConfig
from jmoe.data.packing import Batch
from jmoe.monitor.meter import Meter
from jmoe.nn.model import Transformer
from jmoe.parallel import compiler, processes
from jmoe.train import layout as layouts
from jmoe.train import schedules
from jmoe.train.ahead import Ahead
from jmoe.train.guard import Guard
from jmoe.train.homes import Homes
from jmoe.train.inputs import Inputs, next_batch
from jmoe.train.roll_backs import RollBacks
from jmoe.train.saving import Saver
from jmoe.train.state import TrainState


class Compiled(NamedTuple):
    """The programs of a run; `put` takes a batch to where they want it."""

    train_step: steps.TrainStep
    eval_step: steps.EvalStep
    put: Callable[[Batch], Batch]


def compile_steps(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    run: RunConfig,
    layout: layouts.Layout,
) -> Compiled:
    """Returns the programs, which are compiled when they are called first."""
    options = compiler.options(layout.mesh.devices.flat[0].platform)
    return Compiled(
        jax.jit(
            steps.make_train_step(model, optimizer, run, layout),
            donate_argnums=0,
            compiler_options=options,
        ),
        jax.jit(steps.make_eval_step(model, run, layout)),
        lambda batch: layouts.put_batch(layout, batch),
    )


class End(NamedTuple):
    """Says where a stretch has ended. signal: the number of what stopped it, or 0."""

    state: TrainState
    step: int
    signal: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """What all stretches of a run share.

    asked: returns the number of a signal that asks this process to stop, or 0.
    """

    run: RunConfig
    layout: layouts.Layout
    compiled: Compiled
    inputs: Inputs
    saver: Saver
    back: RollBacks
    homes: Homes
    console: Any
    asked: Callable[[], int]

    def train(self, state: TrainState, step: int, watch: Guard, log: Any) -> End:
        """Takes steps until the last one, a signal, or one that must not count.

        It ends with a checkpoint, but of no state that a step has spoilt.

        Args:
          state: after `step`; donated. The loader stands at `step` too.
          watch: has seen the steps until `step`.
          log: takes the rows of later steps.
        """
        cfg, loader = self.run.train, self.inputs.loader
        meter = Meter(step, self._tokens(step))
        ahead = Ahead()
        loss, stop = math.nan, 0
        state = self.homes.begin(state)
        while step < cfg.steps and not stop and watch.goes_on:
            self.back.leave_out(step, loader)
            batch = next_batch(loader, schedules.microbatches(cfg, step))
            limit = layouts.put_whole(self.layout, watch.loss_limit())
            state, measured = self.compiled.train_step(
                state, self.compiled.put(batch), limit
            )
            step, loss = step + 1, math.nan
            ahead.add(measured)
            watch.add(step, measured, int(loader.get_state()["sequences"]))
            self.homes.add(measured)
            meter.add(batch.tokens_BT[..., 1:].size * self.inputs.num_parts)
            if _is_due(cfg.log_every, step, cfg.steps):
                watch.catch_up()
                self._log(step, measured, watch, meter, log)
            if not watch.goes_on:
                break
            if _is_due(cfg.eval_every, step, cfg.steps):
                with meter.paused(state.step):
                    loss = self._evaluate(step, state, log)
            if self.saver.is_due(step):
                with meter.paused(state.step):
                    log.sync()
                    state, home_LE = self.homes.in_order(state)
                    self.saver.save(step, state, watch, loss)
                    state = self.homes.back(state, home_LE)
            if self.homes.is_due(step) and step < cfg.steps:
                state, moved = self.homes.reassign(state)
                log.log(step, moved)
            asks = step % cfg.signal_every == 0
            stop = processes.any_signal(self.asked(), ask=asks)
        log.sync()
        state, _ = self.homes.in_order(state)
        self.saver.save(step, state, watch, loss)
        return End(state, step, stop)

    def _tokens(self, step: int) -> int:
        """Returns what the run was trained on until `step`, where the loader is."""
        sequences = int(self.inputs.loader.get_state()["sequences"])
        length = self.run.data.sequence_length
        return (sequences - self.back.left_out(step)) * length

    def _log(
        self,
        step: int,
        measured: dict[str, jax.Array],
        watch: Guard,
        meter: Meter,
        log: Any,
    ) -> None:
        metrics = jax.device_get(measured) | {
            "skipped": watch.skipped,
            "rolled_back": self.back.count(step),
        }
        load_LE, bias_LE = metrics.pop("load_LE"), metrics.pop("bias_LE")
        metrics |= load.percentiles("max_vio", metrics["max_vio_L"])
        metrics |= meter.read(step)
        load_LE = load_LE / load_LE.sum(-1, keepdims=True)
        log.log(step, metrics, load_LE=load_LE, bias_LE=bias_LE)
        self.console.update(step, metrics)

    def _evaluate(self, step: int, state: TrainState, log: Any) -> float:
        batches = map(self.compiled.put, self.inputs.held_out)
        metrics = evaluate(self.compiled.eval_step, state, batches)
        log.log(step, metrics)
        self.console.update(step, metrics)
        return metrics["val_loss"]


def evaluate(
    eval_step: steps.EvalStep, state: TrainState, batches: Iterable[Batch]
) -> dict[str, Any]:
    """Returns validation loss, perplexity and global MaxVio, on the host.

    The latter as the mean over layers, of each of them, and as percentiles.
    """
    parts, ahead = [], Ahead()
    for batch in batches:
        parts.append(eval_step(state.params, state.router_state, batch))
        ahead.add(parts[-1])
    total = jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(parts))
    loss = float(total.loss / total.tokens)
    with jax.transfer_guard("allow"):
        max_vio_L = np.asarray(load.max_violation_L(total.load_LE))
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "global_max_vio": max_vio_L.mean(),
        "global_max_vio_L": max_vio_L,
        **load.percentiles("global_max_vio", max_vio_L),
    }


def _is_due(every: int, step: int, last: int) -> bool:
    return step % every == 0 or step == last
