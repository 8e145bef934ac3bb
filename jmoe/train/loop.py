"""A training run from its record to its report, top to bottom.

Steps are taken in stretches (`jmoe.train.stretch`): in one, or after a step that spoilt
the state in another one, from the checkpoint before it (`jmoe.train.roll_backs`).
Nothing moves between host and devices unasked (`jax.transfer_guard`).

Of several processes (`jmoe.parallel.processes`) each feeds its devices and writes its
part of a checkpoint; process 0 alone writes the rest, and shows it.
"""

import contextlib
import functools
import json
import os
import pathlib
import signal
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jmoe.balance import dropping
from jmoe.checkpoint import lock
from jmoe.checkpoint import workdir as workdirs
from jmoe.config import RunConfig, to_dict
from jmoe.data import durable
from jmoe.data.tokenizer import Tokenizer
from jmoe.monitor import report, run_files, server, starts
from jmoe.monitor.console import Console
from jmoe.monitor.metrics_log import MetricsLog
from jmoe.monitor.training import TrainingMeter
from jmoe.nn.model import Transformer
from jmoe.ops import fp8
from jmoe.parallel import balanced, processes
from jmoe.train import guard, homes, horizon, resume, saving, stages, stretch
from jmoe.train import layout as layouts
from jmoe.train.inputs import open_inputs
from jmoe.train.optimizer import make_optimizer
from jmoe.train.roll_backs import RollBacks
from jmoe.train.state import count_parameters, make_state
from jmoe.train.stop_signals import StopSignals
from jmoe.train.trained import CHECKPOINTS, check_start

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
      FloatingPointError: a step wasn't finite or was a spike, and the run may neither
        skip it nor go back, or had to too often (`jmoe.train.guard`).
    """
    cfg = run.train
    _agree_on_run(run, workdir)
    shows = processes.index() == 0
    locked = workdir / lock.FILE, f"workdir={str(workdir)!r}"
    if shows:
        lock.require_free(*locked)
        server.check(run.monitor)
    model = Transformer(run.model, fp8.dot_general(run.precision))
    layout = layouts.make_layout(model, layouts.run_mesh(run.mesh))
    layouts.check_exchange(run.model.moe, layout.mesh)
    homes.check(run)
    if run.mesh.pipe > 1:
        stages.check(run)
    resumes = workdirs.check_run(workdir, run)
    check_start(workdir, run)
    run, decision = horizon.go_on(workdir, run) if resumes else (run, None)
    inputs = open_inputs(run, layout.mesh, workdir if resumes else None)
    optimizer = make_optimizer(run.optimizer, run.horizon, layout)
    compiled = stretch.compile_steps(model, optimizer, run, layout)

    with contextlib.ExitStack() as stack:
        stack.callback(inputs.loader.close)
        if shows:
            if not resumes:  # a directory without a record may hold nothing else
                workdirs.open_run(workdir, run)
            stack.enter_context(lock.hold(*locked))
        store = stack.enter_context(saving.open_store(workdir / CHECKPOINTS, cfg))
        make = functools.partial(make_state, model, optimizer, cfg.seed)
        at_home = homes.Homes(run, layout, make)
        begin = functools.partial(resume.begin, make, layout, store, inputs.loader)
        begun = begin()
        parameters = count_parameters(begun.state.params, run.model)
        notes = [decision]
        if shows:
            changed = workdirs.changes(workdir, run)
            workdirs.open_run(workdir, run)
            _keep_tokenizer(workdir, inputs.tokenizer)
            start = starts.add_start(
                workdir,
                device=_devices(run),
                processes=jax.process_count(),
                parameters=parameters[0],
                active_parameters=parameters[1],
                unigram_entropy=inputs.entropy,
            )
            notes.append(starts.since(start, changed))
        workdirs.check_shared(workdir / run_files.INFO)
        console, page = _Silent(), ""
        holders = 1 if cfg.reassign_every else run.mesh.expert
        meter = TrainingMeter(run.name, cfg.steps, holders, device=_devices(run))
        if shows:
            shown = Console(cfg.steps, start_step=begun.step, followers=[meter.note])
            console = stack.enter_context(shown)
            page = stack.enter_context(server.opened(run.monitor, meter))
        _show_header(console, run, workdir, parameters, begun.step, page)
        for note in filter(None, notes):
            console.note(note)
        signals = stack.enter_context(StopSignals(console.note))
        back = RollBacks(workdir, cfg.max_roll_backs)
        steps = stretch.Stretch(
            run=run,
            layout=layout,
            compiled=compiled,
            inputs=inputs,
            saver=saving.Saver(cfg, store, inputs.loader),
            back=back,
            homes=at_home,
            console=console,
            asked=lambda: signals.first,
        )
        stack.enter_context(jax.transfer_guard("disallow"))
        while True:
            watch = guard.Guard(cfg, begun.guard, console.note)
            log = _Silent()
            if shows:
                log = MetricsLog(workdir, start_step=begun.step, followers=[meter.log])
            with log:
                end = steps.train(begun.state, begun.step, watch, log)
            store.wait()
            if watch.spoilt is None:
                break
            del begun, end  # or there were two states in memory
            with jax.transfer_guard("allow"):
                begun = begin()
            console.note(back.add(begun.step, inputs.loader, watch.spoilt))
        signals.close()
        if watch.verdict is not None:
            raise FloatingPointError(
                f"{watch.verdict} The same command goes on from the newest checkpoint."
            )
        if end.signal:
            name = signal.Signals(end.signal).name
            meter.finish(f"stopped by {name}")
            console.note(
                f"{name}: saved step {end.step}; the same command goes on from it."
            )
            return end.signal
        meter.finish("complete")
        if shows:
            report.write_report(workdir)  # whatever becomes of the samples
        if sample is not None:
            with jax.transfer_guard("allow"):
                samples = sample(run, layout, end.state.variables, inputs.tokenizer)
            if shows:
                _write_samples(workdir, end.step, samples)
                report.write_report(workdir)
        console.finish(workdir, unigram_entropy=inputs.entropy)
        return 0


class _Silent:
    """Log and console of a process that neither writes nor shows anything."""

    def ignore(self, *_: Any, **__: Any) -> None:
        pass

    __enter__ = __exit__ = ignore

    log = sync = header = update = note = finish = ignore


def _agree_on_run(run: RunConfig, workdir: pathlib.Path) -> None:
    record = to_dict(run)
    record["data"].pop("cache_dir")  # each host may have its own
    processes.agree({**record, "workdir": str(workdir.absolute())})


def _keep_tokenizer(workdir: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Copies it, old or new, never half: a run that goes on trusts these files."""
    for name, content in tokenizer.files.items():
        durable.make_directory((workdir / name).parent)
        durable.write_bytes(workdir / name, content)


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
    page: str = "",
) -> None:
    console.header(
        name=run.name,
        parameters=parameters[0],
        active_parameters=parameters[1],
        tokens_per_step=run.train.batch_size * run.data.sequence_length,
        device=_devices(run),
        run_dir=workdir,
        lending=_lending(run),
        page=page,
    )
    exchange, router = run.model.moe.exchange, run.model.moe.router
    factor, peers = exchange.capacity_factor, run.mesh.expert
    if exchange.backend == "balanced" and peers == 1:
        console.note(
            "model.moe.exchange.backend='balanced' has nothing to lend: with expert=1 "
            "one device computes all experts."
        )
    if run.train.reassign_every and peers == 1:
        console.note(
            f"train.reassign_every={run.train.reassign_every} has nothing to "
            "re-assign: with expert=1 one device is the home of all experts."
        )
    if factor is not None and dropping.is_dropless(factor, router, peers):
        console.note(
            f"capacity_factor={factor} drops nothing: with expert={peers} it leaves "
            "room for all tokens."
        )
    if step >= run.train.steps:
        console.note(f"Complete at step {step}; raise train.steps to go on.")
    elif step:
        console.note(f"Goes on from the checkpoint of step {step}.")


def _lending(run: RunConfig) -> str:
    """Says how many experts devices lend each other; nothing if they don't."""
    exchange, peers = run.model.moe.exchange, run.mesh.expert
    if exchange.backend != "balanced" or peers == 1:
        return ""
    slots = balanced.num_slots(exchange, run.model.moe.router, peers)
    experts = "1 expert" if slots == 1 else f"{slots} experts"
    return f"a device borrows up to {experts} a layer and microbatch"


def _devices(run: RunConfig) -> str:
    """Says what the run is on, and the axes of its mesh that have several devices."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"CPU, {os.cpu_count()} cores"
    if run.mesh.num_devices == 1:
        return kind
    axes = [f"{axis}={size}" for axis, size in run.mesh.shape.items() if size > 1]
    return f"{run.mesh.num_devices} x {kind}: {', '.join(axes)}"
