"""A training step on sixteen virtual devices of the CPU, against one on one device.

    python scripts/bench.py --suite=mesh

The same model, the same global batch, the same cores: what sixteen devices take longer
is the price of dividing the step. They copy what real devices have each their own of
(the weights that all compute with, the tokens that travel), and multiply with fewer
rows at a time.

Three layers of the `bench_s` shape, in float32, with AdamW. On the mesh the experts
recompute their activations (`moe.remat`), as stored ones would take memory for all
devices' tokens. Of two exchanges, the padded all-to-all sends each peer as many slots
as there are tokens, which can't overflow; the other gathers all tokens.

They take turns, as in the suite `train_cpu`. As in the suite `pipeline`, the second of
a turn's steps counts, and several devices have their memory in huge pages (one isn't
faster with them).
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.benchmarks.report import Figure, Report
from experiments.benchmarks.workers import (
    HUGE_PAGES,
    Seat,
    Turn,
    Worker,
    take_turns,
    virtual_devices,
)
from experiments.benchmarks.workload import Workload
from jmoe.config import MeshConfig, ModelConfig, override
from jmoe.train.runtime import keep_freed_memory

DEVICES = 16
MESH = MeshConfig(expert=8, tensor=2)
LAYERS = 3
STEPS_A_TURN = 2

# What is measured beside the step on one device: an exchange, and its definition.
EXCHANGES = {
    "padded": "a dense all-to-all of each token to each device of its experts",
    "gather": "every token to every device of the expert axis, results reduced",
}


def run(rounds: int, say: Callable[[str], None]) -> Report:
    """Measures everything; `say` is told what comes next."""
    workload = Workload(
        model=override(ModelConfig.preset("bench_s"), [f"num_layers={LAYERS}"]),
        batch=16,
        length=512,
    )
    say("training steps: compiling them takes some minutes")
    turns = measure(workload, rounds)
    return Report(
        suite="mesh",
        compared=(),
        settings={
            "model": f"bench_s with {LAYERS} layers",
            "mesh": dict(MESH.shape),
            "batch": workload.batch,
            "length": workload.length,
            "rounds": rounds,
        },
        figures=list(figures(turns, workload)),
        samples={
            "loss": {name: turns[name][-1].result for name in turns},
            "seconds": {name: [turn.seconds for turn in turns[name]] for name in turns},
        },
    )


def measure(workload: Workload, rounds: int) -> Mapping[str, Sequence[Turn]]:
    """Turns of `one` device, and of the mesh with each exchange."""
    with (
        _worker(1, workload=workload) as one,
        _worker(DEVICES, workload=on_mesh(workload, "padded"), mesh=MESH) as padded,
        _worker(DEVICES, workload=on_mesh(workload, "gather"), mesh=MESH) as gather,
    ):
        workers = {"one": one, "padded": padded, "gather": gather}
        seats = {n: Seat(w, "step", STEPS_A_TURN) for n, w in workers.items()}
        return take_turns(seats, rounds)


def on_mesh(workload: Workload, exchange: str) -> Workload:
    settings = [
        f"moe.exchange.backend={exchange}",
        "moe.backend=blocks",
        "moe.remat=activations",
    ]
    return dataclasses.replace(workload, model=override(workload.model, settings))


def _worker(devices: int, **options: Any) -> Worker:
    return Worker(
        "experiments.benchmarks.ours.train_step",
        setup=keep_freed_memory,
        environment=virtual_devices(devices) | (HUGE_PAGES if devices > 1 else {}),
        **options,
    )


def figures(
    turns: Mapping[str, Sequence[Turn]], workload: Workload
) -> Iterator[Figure]:
    """Times, and their ratios within a round."""
    seconds = {name: [turn.seconds[-1] for turn in turns[name]] for name in turns}
    definitions = {"one": "one device"} | EXCHANGES
    for name, definition in definitions.items():
        devices = "1 device" if name == "one" else f"{DEVICES} devices, {name}"
        yield Figure(
            name=f"training step, {devices}",
            value=statistics.median(seconds[name]),
            unit="s",
            definition=f"{workload.tokens} tokens; {definition}",
        )
    for above, below, at_most in (
        ("padded", "one", 1.5),
        ("gather", "one", None),
        ("padded", "gather", None),
    ):
        pairs = zip(seconds[above], seconds[below], strict=True)
        yield Figure(
            name=f"training step, {above} / {below}",
            value=statistics.median(a / b for a, b in pairs),
            unit="×",
            definition="time of a step over the other's, the median over rounds",
            at_most=at_most,
        )
    for name in turns:
        yield Figure(
            name=f"peak memory, {name}",
            value=turns[name][-1].peak_bytes / 2**30,
            unit="GiB",
            definition="ru_maxrss after the last step, compilation included",
        )
