"""A training run on sixteen virtual devices, with lent experts and without.

The tiny model trains on its own text, so that routings are as uneven as they are at
first, while its bias still learns. It has no MTP module, which would only make another
such layer. Without loans, buffers have room for every token, and nothing is dropped
either. Both take turns, and see the same batches: those of the preset, with 128 tokens
for each device, for 200 steps in 5 rounds; and such with 1,024, for a tenth as many, as
each takes several times as long.

All devices share the same cores: one that waits for the busiest costs nothing here. So
what this compares is the work, of which empty slots are a part, the loans' own, and
that of collectives, at which sixteen threads meet on few cores.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.report import Figure
from experiments.benchmarks.workers import (
    HUGE_PAGES,
    Seat,
    Tasks,
    Turn,
    Worker,
    per_round,
    ratio,
    take_turns,
    virtual_devices,
    warm_up,
)
from jmoe.config import MeshConfig, RunConfig, override, presets
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer
from jmoe.train.inputs import next_batch, open_inputs
from jmoe.train.layout import born, make_layout, put_batch, run_mesh
from jmoe.train.optimizer import make_optimizer
from jmoe.train.runtime import keep_freed_memory, step_after_step
from jmoe.train.state import make_state
from jmoe.train.step import make_train_step

DEVICES = 16
# Steps of a turn, by the sequences of 128 tokens that a device has.
STEPS_A_TURN = {1: 40, 8: 4}
SIDES = ("balanced", "padded")
TEMPORARIES = "temporary_bytes"
# By how much the last steps' losses may differ; they start alike, but sums are in
# another order.
MOST_APART = 0.02


def steps(rounds: int, say: Callable[[str], None]) -> Part:
    """Measures training steps with either exchange, and few tokens or more."""
    turns = {}
    for sequences, steps_a_turn in STEPS_A_TURN.items():
        say(
            f"{rounds * steps_a_turn} training steps on {DEVICES} virtual devices, "
            f"{sequences} sequences each: compiling them takes some minutes"
        )
        turns[sequences] = measure(sequences, rounds, steps_a_turn)
    return Part(
        figures=[figure for n in turns for figure in figures(n, turns[n])],
        settings={
            "model": "tiny without MTP",
            "mesh": {"expert": DEVICES},
            "rounds": rounds,
            "steps_a_round_by_sequences_a_device": STEPS_A_TURN,
        },
        samples={
            f"{name}, {n} sequences": {
                "seconds": [turn.seconds for turn in of_side],
                "last_step": [turn.result for turn in of_side],
            }
            for n, sides in turns.items()
            for name, of_side in sides.items()
        },
        wrong=tuple(flaw for sides in turns.values() for flaw in apart(sides)),
    )


def measure(
    sequences: int, rounds: int, steps_a_turn: int
) -> Mapping[str, Sequence[Turn]]:
    """Returns turns of both, with so many sequences for each device."""
    with (
        _worker(run_with("balanced", sequences)) as balanced,
        _worker(run_with("padded", sequences)) as padded,
    ):
        workers = {"balanced": balanced, "padded": padded}
        seats = {n: Seat(w, "step", steps_a_turn) for n, w in workers.items()}
        return take_turns(seats, rounds)


def _worker(run: RunConfig) -> Worker:
    return Worker(
        "experiments.benchmarks.balance_steps.training",
        setup=keep_freed_memory,
        environment=virtual_devices(DEVICES) | HUGE_PAGES,
        run=run,
    )


def run_with(exchange: str, sequences: int) -> RunConfig:
    """Returns the tiny run with this exchange."""
    batch = sequences * DEVICES
    settings = [
        "model.mtp_depth=0",
        f"model.moe.exchange.backend={exchange}",
        f"train.batch_size={batch}",
        f"train.microbatch_size={batch}",
    ]
    run = override(presets.tiny_run(), settings)
    return dataclasses.replace(run, mesh=MeshConfig(expert=DEVICES))


def training(run: RunConfig) -> Tasks:
    """`step` trains on, and returns what it measures, and bytes of temporaries."""
    step_after_step()  # as scripts/train.py does
    model = Transformer(run.model)
    layout = make_layout(model, run_mesh(run.mesh))
    optimizer = make_optimizer(run.optimizer, run.horizon, layout)
    advance = jax.jit(make_train_step(model, optimizer, run, layout), donate_argnums=0)
    state = born(layout, functools.partial(make_state, model, optimizer, 0))
    loader = open_inputs(run, layout.mesh, None).loader
    microbatches = run.train.batch_size // run.train.microbatch_size

    def read() -> Batch:
        return put_batch(layout, next_batch(loader, microbatches))

    compiled = advance.lower(state, read()).compile()
    stats = compiled.memory_analysis()
    assert stats is not None, "XLA tells it of CPUs"
    memory = {TEMPORARIES: stats.temp_size_in_bytes}

    def step() -> dict[str, float]:
        nonlocal state
        state, metrics = compiled(state, read())
        jax.block_until_ready(state)
        scalars = (name for name in metrics if not metrics[name].ndim)
        return {name: float(metrics[name]) for name in scalars} | memory

    warm_up(step)
    return {"step": step}


def figures(sequences: int, turns: Mapping[str, Sequence[Turn]]) -> Iterator[Figure]:
    """Yields times, their ratio within a round, and memory."""
    seconds = {name: per_round(turns[name]) for name in SIDES}
    tokens = sequences * presets.tiny_run().data.sequence_length
    of_size = f"{tokens:,} tokens a device"
    for name in SIDES:
        yield Figure(
            name=f"training step, {name}, {of_size}",
            value=statistics.median(seconds[name]),
            unit="s",
            definition=f"tiny on {DEVICES} virtual devices; the median over rounds of "
            "a turn's median",
        )
    yield Figure(
        name=f"training step, balanced / padded, {of_size}",
        value=ratio(seconds["balanced"], seconds["padded"]),
        unit="×",
        definition="time of a step over the other's, the median over rounds",
        at_most=1.0,
    )
    for name in SIDES:
        yield Figure(
            name=f"temporaries of a step, {name}, {of_size}",
            value=turns[name][-1].result[TEMPORARIES] / 2**20,
            unit="MiB",
            definition="of each device, by XLA's analysis of the compiled step",
        )
        yield Figure(
            name=f"peak memory of training, {name}, {of_size}",
            value=turns[name][-1].peak_bytes / 2**30,
            unit="GiB",
            definition="ru_maxrss after the last step, compilation included",
        )


def apart(turns: Mapping[str, Sequence[Turn]]) -> tuple[str, ...]:
    """Returns what is wrong, if losses have parted."""
    ours, theirs = (turns[name][-1].result["loss"] for name in SIDES)
    if abs(ours / theirs - 1) <= MOST_APART:
        return ()
    return (f"the loss is {ours:.4f} with lent experts, and {theirs:.4f} without",)
