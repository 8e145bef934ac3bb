"""A training run on sixteen virtual devices, with lent experts and without.

The tiny model trains on its own text, so that routings are as uneven as they are at
first, while its bias still learns. Without loans, buffers have room for every token,
and nothing is dropped either. Both take turns, and see the same batches.

All devices share the same cores: one that waits for the busiest costs nothing here. So
what this compares is the work, of which empty slots are a part, and the loans' own.
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
from jmoe.nn.model import Transformer
from jmoe.train.inputs import next_batch, open_inputs
from jmoe.train.layout import born, make_layout, put_batch, run_mesh
from jmoe.train.optimizer import make_optimizer
from jmoe.train.runtime import keep_freed_memory, step_after_step
from jmoe.train.state import make_state
from jmoe.train.step import make_train_step

DEVICES = 16
STEPS_A_TURN = 40  # 200 in 5 rounds
SIDES = ("balanced", "padded")
# By how much the last steps' losses may differ; they start alike, but sums are in
# another order.
MOST_APART = 0.02


def steps(rounds: int, say: Callable[[str], None]) -> Part:
    """Measures training steps with either exchange."""
    say(f"{rounds * STEPS_A_TURN} training steps on {DEVICES} virtual devices")
    turns = measure(rounds)
    return Part(
        figures=list(figures(turns)),
        settings={
            "model": "tiny",
            "mesh": {"expert": DEVICES},
            "rounds": rounds,
            "steps_a_round": STEPS_A_TURN,
        },
        samples={
            name: {
                "seconds": [turn.seconds for turn in turns[name]],
                "last_step": [turn.result for turn in turns[name]],
            }
            for name in turns
        },
        wrong=apart(turns),
    )


def measure(
    rounds: int, steps_a_turn: int = STEPS_A_TURN
) -> Mapping[str, Sequence[Turn]]:
    """Returns turns of both."""
    with _worker("balanced") as balanced, _worker("padded") as padded:
        workers = {"balanced": balanced, "padded": padded}
        seats = {n: Seat(w, "step", steps_a_turn) for n, w in workers.items()}
        return take_turns(seats, rounds)


def _worker(exchange: str) -> Worker:
    return Worker(
        "experiments.benchmarks.balance_steps.training",
        setup=keep_freed_memory,
        environment=virtual_devices(DEVICES) | HUGE_PAGES,
        run=run_with(exchange),
    )


def run_with(exchange: str) -> RunConfig:
    """Returns the tiny run with this exchange, a sequence for each device."""
    run = override(presets.tiny_run(), [f"model.moe.exchange.backend={exchange}"])
    return dataclasses.replace(run, mesh=MeshConfig(expert=DEVICES))


def training(run: RunConfig) -> Tasks:
    """`step` trains on, and returns what it measures."""
    step_after_step()  # as scripts/train.py does
    model = Transformer(run.model)
    layout = make_layout(model, run_mesh(run.mesh))
    optimizer = make_optimizer(run.optimizer, run.horizon, layout)
    advance = jax.jit(make_train_step(model, optimizer, run, layout), donate_argnums=0)
    state = born(layout, functools.partial(make_state, model, optimizer, 0))
    loader = open_inputs(run, layout.mesh, None).loader
    microbatches = run.train.batch_size // run.train.microbatch_size

    def step() -> dict[str, float]:
        nonlocal state
        batch = put_batch(layout, next_batch(loader, microbatches))
        state, metrics = advance(state, batch)
        jax.block_until_ready(state)
        return {
            name: float(metrics[name]) for name in metrics if not metrics[name].ndim
        }

    warm_up(step)
    return {"step": step}


def figures(turns: Mapping[str, Sequence[Turn]]) -> Iterator[Figure]:
    """Yields times, their ratio within a round, and memory."""
    seconds = {name: per_round(turns[name]) for name in SIDES}
    for name in SIDES:
        yield Figure(
            name=f"training step, {name}",
            value=statistics.median(seconds[name]),
            unit="s",
            definition=f"tiny on {DEVICES} virtual devices; the median over rounds of "
            "a turn's median",
        )
    yield Figure(
        name="training step, balanced / padded",
        value=ratio(seconds["balanced"], seconds["padded"]),
        unit="×",
        definition="time of a step over the other's, the median over rounds",
        at_most=1.0,
    )
    for name in SIDES:
        yield Figure(
            name=f"peak memory of training, {name}",
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
