"""A training run from its record to its report, top to bottom.

The device computes, the host feeds it: batches are read ahead and a few steps are
dispatched without waiting. The host waits for all of them where it must show or store
something: at a log, an evaluation, a checkpoint. Nothing moves between the two unasked
(`jax.transfer_guard`).

Of several processes (`jmoe.parallel.processes`) each feeds its devices and writes its
part of a checkpoint; process 0 alone writes the rest, and shows it.

Shapes: A microbatch, B sequence, T position, L MoE layer, E expert.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jmoe.train.step as steps
from jmoe.balance import dropping, load
from jmoe.checkpoint import lock, pieces
from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.store import Store
from jmoe.config import RunConfig, to_dict
from jmoe.data import durable
from jmoe.data.loader import Loader
from jmoe.data.packing import Batch
from jmoe.data.tokenizer import Tokenizer
from jmoe.nn.model import Transformer
from jmoe.ops import fp8
from jmoe.parallel import compiler, processes
from jmoe.train import guard, horizon, report, run_files, schedules, stages
from jmoe.train import layout as layouts
from jmoe.train.ahead import Ahead
from jmoe.train.console import Console
from jmoe.train.inputs import next_batch, open_inputs
from jmoe.train.metrics_log import MetricsLog
from jmoe.train.optimizer import make_optimizer
from jmoe.train.starts import add_start
from jmoe.train.state import (
    TrainState,
    count_parameters,
    make_state,
    require_step,
)
from jmoe.train.stop_signals import StopSignals
from jmoe.train.trained import CHECKPOINTS, check_start

_GUARD = "guard"  # its state, beside the data loader's position

# Pairs of prompt and continuation, from a trained model's variables as they lie on the
# mesh. All processes call it.
Sampler = Callable[
    [RunConfig, layouts.Layout, Any, Tokenizer], Sequence[tuple[str, str]]
]


def train(
    run: RunConfig, workdir: pathlib.Path, *, sample: Sampler | None = None
) -> int:
    """Trains `run` in `workdir`, going on where an earlier call stopped.

    Args:
      sample: makes the texts that the report shows, from the trained model.

    Returns:
      0 when the run is complete, or the number of the signal (SIGTERM, SIGINT) that
      stopped it after a last checkpoint.

    Raises:
      ValueError, FileNotFoundError: a mistake in the record, the data or the workdir,
        a difference in these between processes, a workdir that another run writes to,
        or a checkpoint that isn't finite; before anything is overwritten.
      FloatingPointError: a step wasn't finite or was a spike, and the run may not skip
        it, or had to skip too many (`jmoe.train.guard`).
    """
    cfg = run.train
    _agree_on_run(run, workdir)
    shows = processes.index() == 0
    locked = workdir / lock.FILE, f"workdir={str(workdir)!r}"
    if shows:
        lock.require_free(*locked)
    model = Transformer(run.model, fp8.dot_general(run.precision))
    layout = layouts.make_layout(model, layouts.run_mesh(run.mesh))
    layouts.check_exchange(run.model.moe.exchange, layout.mesh)
    if run.mesh.pipe > 1:
        stages.check(run)
    resumes = workdirs.check_run(workdir, run)
    check_start(workdir, run)
    run, decision = horizon.go_on(workdir, run) if resumes else (run, None)
    inputs = open_inputs(run, layout.mesh, workdir if resumes else None)
    loader, tokenizer = inputs.loader, inputs.tokenizer
    optimizer = make_optimizer(run.optimizer, run.horizon, layout)
    train_step = jax.jit(
        steps.make_train_step(model, optimizer, run, layout),
        donate_argnums=0,
        compiler_options=compiler.options(layout.mesh.devices.flat[0].platform),
    )
    eval_step = jax.jit(steps.make_eval_step(model, run, layout))
    put = functools.partial(layouts.put_batch, layout)

    with contextlib.ExitStack() as stack:
        stack.callback(loader.close)
        if shows:
            if not resumes:  # a directory without a record may hold nothing else
                workdirs.open_run(workdir, run)
            stack.enter_context(lock.hold(*locked))
        store = stack.enter_context(
            Store(workdir / CHECKPOINTS, keep=cfg.keep_checkpoints)
        )
        make = functools.partial(make_state, model, optimizer, cfg.seed)
        state, step, saved = _restore_or_make(make, layout, store, loader)
        parameters = count_parameters(state.params, run.model.moe.router)
        if shows:
            workdirs.open_run(workdir, run)
            _keep_tokenizer(workdir, tokenizer)
            add_start(
                workdir,
                device=_devices(run),
                parameters=parameters[0],
                active_parameters=parameters[1],
                unigram_entropy=inputs.entropy,
            )
        workdirs.check_shared(workdir / run_files.INFO)
        log, console = _Silent(), _Silent()
        if shows:
            log = stack.enter_context(MetricsLog(workdir, start_step=step))
            console = stack.enter_context(Console(cfg.steps, start_step=step))
        _show_header(console, run, workdir, parameters, step)
        if decision is not None:
            console.note(decision)
        signals = stack.enter_context(StopSignals(console.note))
        watch = guard.Guard(cfg, saved, console.note)
        stack.enter_context(jax.transfer_guard("disallow"))

        def save(step: int, state: TrainState) -> None:
            """A checkpoint, but of no state that a step has spoilt."""
            log.sync()
            position = {**loader.get_state(), _GUARD: watch.state()}
            if watch.verdict is None or cfg.skips_steps:
                store.save(step, state, position)

        sequences = int(loader.get_state()["sequences"])
        meter = _Meter(step, sequences * run.data.sequence_length)
        ahead = Ahead()
        stop = 0  # or the signal that any process got
        while step < cfg.steps and not stop and watch.verdict is None:
            batch = next_batch(loader, schedules.microbatches(cfg, step))
            limit = layouts.put_whole(layout, watch.loss_limit())
            state, measured = train_step(state, put(batch), limit)
            step += 1
            ahead.add(measured)
            watch.add(step, measured)
            meter.add(batch.tokens_BT[..., 1:].size * inputs.num_parts)
            if _is_due(cfg.log_every, step, cfg.steps):
                watch.catch_up()
                metrics = jax.device_get(measured) | {"skipped": watch.skipped}
                load_LE, bias_LE = metrics.pop("load_LE"), metrics.pop("bias_LE")
                metrics |= meter.read(step)
                load_LE = load_LE / load_LE.sum(-1, keepdims=True)
                log.log(step, metrics, load_LE=load_LE, bias_LE=bias_LE)
                console.update(step, metrics)
            if _is_due(cfg.eval_every, step, cfg.steps):
                with meter.paused(state):
                    metrics = evaluate(eval_step, state, map(put, inputs.held_out))
                log.log(step, metrics)
                console.update(step, metrics)
            if _is_due(cfg.checkpoint_every, step, cfg.steps):
                with meter.paused(state):
                    save(step, state)
            asks = step % cfg.signal_every == 0
            stop = processes.any_signal(signals.first, ask=asks)

        save(step, state)
        store.wait()
        signals.close()
        if watch.verdict is not None:
            raise FloatingPointError(
                f"{watch.verdict} The same command goes on from the newest checkpoint."
            )
        if stop:
            name = signal.Signals(stop).name
            console.note(
                f"{name}: saved step {step}; the same command goes on from it."
            )
            return stop
        if shows:
            report.write_report(workdir)  # whatever becomes of the samples
        if sample is not None:
            with jax.transfer_guard("allow"):
                samples = sample(run, layout, state.variables, tokenizer)
            if shows:
                _write_samples(workdir, step, samples)
                report.write_report(workdir)
        console.finish(workdir, unigram_entropy=inputs.entropy)
        return 0


def evaluate(
    eval_step: steps.EvalStep, state: TrainState, batches: Iterable[Batch]
) -> dict[str, Any]:
    """Validation loss, perplexity and global MaxVio, on the host."""
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
    }


class _Silent:
    """Log and console of a process that neither writes nor shows anything."""

    def ignore(self, *_: Any, **__: Any) -> None:
        pass

    log = sync = header = update = note = finish = ignore


class _Meter:
    """Counts tokens, and time without what isn't training."""

    def __init__(self, step: int, tokens: int):
        self._tokens = tokens
        self._since = (step, tokens, time.perf_counter())
        self._compiling = True

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def read(self, step: int) -> dict[str, float]:
        """Speed since the last reading; the first stretch compiles and has none."""
        last_step, last_tokens, then = self._since
        now = time.perf_counter()
        self._since = (step, self._tokens, now)
        speed = {
            "tokens_per_second": (self._tokens - last_tokens) / (now - then),
            "step_seconds": (now - then) / (step - last_step),
        }
        known = {} if self._compiling else speed
        self._compiling = False
        return {"tokens": self._tokens, **known}

    @contextlib.contextmanager
    def paused(self, state: TrainState) -> Iterator[None]:
        """Leaves out the time inside, once the steps under way are done."""
        jax.block_until_ready(state.step)
        start = time.perf_counter()
        yield
        step, tokens, then = self._since
        self._since = (step, tokens, then + time.perf_counter() - start)


def _is_due(every: int, step: int, last: int) -> bool:
    return step % every == 0 or step == last


def _agree_on_run(run: RunConfig, workdir: pathlib.Path) -> None:
    record = to_dict(run)
    record["data"].pop("cache_dir")  # each host may have its own
    processes.agree({**record, "workdir": str(workdir.absolute())})


def _keep_tokenizer(workdir: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Old or new, never half: a run that goes on trusts these files."""
    for name, content in tokenizer.files.items():
        durable.make_directory((workdir / name).parent)
        durable.write_bytes(workdir / name, content)


def _restore_or_make(
    make: Callable[[], TrainState],
    layout: layouts.Layout,
    store: Store,
    loader: Loader,
) -> tuple[TrainState, int, Mapping[str, Any] | None]:
    """The state, its step, and what the guard had seen until then."""
    if store.latest_step() is None:
        return layouts.born(layout, make), 0, None
    abstract = layouts.abstract(layout, make)
    if _holds_weights_only(store):
        state, step = _restore_weights(make, layout, abstract, store), 0
        position = {}
    else:
        state, position, step = store.restore(abstract)
        require_step(state, step, store.locate(step))
        loader.set_state(position)
    guard.require_finite(state, store.locate(step))
    return state, step, position.get(_GUARD)


def _holds_weights_only(store: Store) -> bool:
    """Whether the checkpoint was imported, and has nothing of an optimizer."""
    stored = pieces.Pieces(store.locate()).shapes
    return not any(name.startswith("opt_state/") for name in stored)


def _restore_weights(
    make: Callable[[], TrainState],
    layout: layouts.Layout,
    abstract: TrainState,
    store: Store,
) -> TrainState:
    """Imported weights, with the rest of a new run's state."""
    abstract_weights = {
        "params": abstract.params,
        "router_state": abstract.router_state,
    }
    weights, _, _ = store.restore(abstract_weights)

    def rest() -> tuple[jax.Array, Any]:  # the weights it makes aren't returned
        state = make()
        return state.step, state.opt_state

    step, opt_state = layouts.born(layout, rest)
    return TrainState(step=step, opt_state=opt_state, **weights)


def _write_samples(
    workdir: pathlib.Path, step: int, samples: Sequence[tuple[str, str]]
) -> None:
    """Adds these to the samples of earlier steps, in place of any of this one."""
    path = workdir / run_files.SAMPLES
    rows = [row for row in run_files.read_rows(path) if row["step"] < step]
    rows += [{"step": step, "prompt": p, "text": text} for p, text in samples]
    durable.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _show_header(
    console: "Console | _Silent",
    run: RunConfig,
    workdir: pathlib.Path,
    parameters: tuple[int, int],
    step: int,
) -> None:
    console.header(
        name=run.name,
        parameters=parameters[0],
        active_parameters=parameters[1],
        tokens_per_step=run.train.batch_size * run.data.sequence_length,
        device=_devices(run),
        run_dir=workdir,
    )
    factor, router = run.model.moe.exchange.capacity_factor, run.model.moe.router
    peers = run.mesh.expert
    if factor is not None and dropping.has_room_for_all(factor, router, peers):
        console.note(
            f"capacity_factor={factor} drops nothing: with expert={peers} it leaves "
            "room for all tokens."
        )
    if step >= run.train.steps:
        console.note(f"Complete at step {step}; raise train.steps to go on.")
    elif step:
        console.note(f"Goes on from the checkpoint of step {step}.")


def _devices(run: RunConfig) -> str:
    """What the run is on, and the axes of its mesh that have several devices."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"CPU, {os.cpu_count()} cores"
    if run.mesh.num_devices == 1:
        return kind
    axes = [f"{axis}={size}" for axis, size in run.mesh.shape.items() if size > 1]
    return f"{run.mesh.num_devices} x {kind}: {', '.join(axes)}"
