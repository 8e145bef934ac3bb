"""Training on the CPU: jmoe, transformers, and the machine's own limit, side by side.

    python scripts/bench.py --suite=train_cpu

On the `bench_s` shape, in float32, with AdamW and 4 sequences of 512 tokens a step:

- a training step of jmoe's and of transformers', each in a process of its own;
- the step's floor: the operations of all its matmuls, at the rate of plain XLA matmuls
  of the same shapes. Attention counts for the pairs on and below the diagonal, and at
  that rate too, although its own matmuls are small;
- one MoE layer, router and routed experts, forward and backward: jmoe's, transformers',
  GShard's with a capacity, and the same operations as plain dense matmuls. Between the
  last and jmoe's stand the experts alone, balanced, with their rows in place: what XLA
  needs where there is nothing to route.

They take turns at all of the machine's cores. A time is the median over rounds of the
median of a turn; a ratio is the median over rounds of the ratio within a round, because
the machine's speed drifts.
"""

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.benchmarks.report import Figure, Report
from experiments.benchmarks.workers import (
    Seat,
    Turn,
    Worker,
    per_round,
    ratio,
    take_turns,
)
from experiments.benchmarks.workload import Linear, Workload
from jmoe.config import ModelConfig
from jmoe.train.runtime import keep_freed_memory

Turns = Mapping[str, Sequence[Turn]]

SIDES = ("ours", "theirs")
STEPS_A_TURN = 2
LAYERS_A_TURN = 3
_COMPARED = ("torch", "transformers")
_OURS = "experiments.benchmarks.ours"
_THEIRS = "experiments.benchmarks.theirs"

# What keep_freed_memory asks of glibc, for a process that cannot ask by itself.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
}


def run(rounds: int, say: Callable[[str], None]) -> Report:
    """Measures everything; `say` is told what comes next.

    Raises:
      ValueError: torch or transformers isn't installed.
    """
    missing = [name for name in _COMPARED if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(
            f"suite='train_cpu' measures against {' and '.join(missing)}, not "
            "installed here; pip install -e '.[test]' brings them."
        )
    workload = Workload(model=ModelConfig.preset("bench_s"), batch=4, length=512)
    say("torch's AdamW, fused and foreach")
    adamw = measure_adamw(workload)
    fastest = min(adamw, key=lambda kind: _median(per_round(adamw[kind])))
    say("training steps: compiling both sides takes a minute or two")
    step, parameters = measure_step(workload, rounds, adamw=fastest)
    say("one MoE layer")
    layer = measure_layer(workload, rounds)
    return Report(
        suite="train_cpu",
        compared=_COMPARED,
        settings={
            "model": "bench_s",
            "parameters": parameters,
            "batch": workload.batch,
            "length": workload.length,
            "rounds": rounds,
            "torch_adamw": fastest,
        },
        figures=[
            *floor_figures(step, workload),
            *step_figures(step, workload),
            *memory_figures(step),
            *layer_figures(layer, workload),
        ],
        samples={
            "loss": {side: step[side][-1].result for side in SIDES},
            "seconds": {
                part: {name: [turn.seconds for turn in turns[name]] for name in turns}
                for part, turns in (("adamw", adamw), ("step", step), ("layer", layer))
            },
            "matmul_gflops": matmul_rates(step["matmuls"], workload.step_linears()),
        },
    )


def measure_adamw(workload: Workload) -> Turns:
    """Measures torch's AdamWs, by kind; the better one goes into the training step."""
    kinds = ("fused", "foreach")
    with _theirs("adamw_step", workload=workload, kinds=kinds) as worker:
        return take_turns({kind: Seat(worker, kind) for kind in kinds}, rounds=3)


def measure_step(workload: Workload, rounds: int, *, adamw: str) -> tuple[Turns, int]:
    """Turns of `ours`, `theirs` and `matmuls`, and the number of parameters."""
    with (
        _ours("train_step", workload=workload) as ours,
        _theirs("train_step", workload=workload, adamw=adamw) as theirs,
        _ours("plain_matmuls", linears=workload.step_linears()) as matmuls,
    ):
        parameters = ours.run("parameters").result
        assert theirs.run("parameters").result == parameters
        seats = {
            "ours": Seat(ours, "step", STEPS_A_TURN),
            "matmuls": Seat(matmuls, "seconds"),
            "theirs": Seat(theirs, "step", STEPS_A_TURN),
        }
        return take_turns(seats, rounds), parameters


def measure_layer(workload: Workload, rounds: int) -> Turns:
    """Turns of `ours`, `theirs`, `compiled` (theirs too), `gshard` and the floors."""
    with (
        _ours("moe_layer", workload=workload) as ours,
        _theirs("moe_layer", workload=workload) as theirs,
        _ours("plain_matmuls", linears=workload.routed_linears()) as matmuls,
    ):
        seats = {
            "ours": Seat(ours, "ours", LAYERS_A_TURN),
            "matmuls": Seat(matmuls, "seconds"),
            "theirs": Seat(theirs, "eager", LAYERS_A_TURN),
            "compiled": Seat(theirs, "compiled", LAYERS_A_TURN),
            "gshard": Seat(ours, "gshard", LAYERS_A_TURN),
            "in_place": Seat(ours, "in_place", LAYERS_A_TURN),
        }
        return take_turns(seats, rounds)


def _ours(side: str, **options: Any) -> Worker:
    return Worker(f"{_OURS}.{side}", setup=keep_freed_memory, **options)


def _theirs(side: str, **options: Any) -> Worker:
    return Worker(f"{_THEIRS}.{side}", environment=KEEP_FREED_MEMORY, **options)


def floor_figures(turns: Turns, workload: Workload) -> Iterator[Figure]:
    """The machine's rate, and how near it the two steps come."""
    linears = workload.step_linears()
    linear_flops = sum(linear.flops for linear in linears)
    rates = [linear_flops / s for s in _matmul_seconds(turns["matmuls"], linears)]
    yield Figure(
        name="plain matmul rate",
        value=_median(rates) / 1e9,
        unit="GFLOP/s",
        definition="XLA's, over the linear maps of a step and their gradients",
    )
    floors = {}
    for causal, name in ((True, "step's floor"), (False, "floor with full attention")):
        flops = linear_flops + workload.attention_flops(causal=causal)
        floors[causal] = [flops / rate for rate in rates]
        attention = "below the diagonal" if causal else "over the full square"
        yield Figure(
            name=name,
            value=_median(floors[causal]),
            unit="s",
            definition=f"{flops / 1e9:.1f} GFLOP at that rate, attention {attention}",
        )
    for side, at_least in (("ours", 0.8), ("theirs", None)):
        yield Figure(
            name=f"floor / {side}",
            value=ratio(floors[True], per_round(turns[side])),
            unit="×",
            definition="share of a training step that its matmuls need",
            at_least=at_least,
        )


def step_figures(turns: Turns, workload: Workload) -> Iterator[Figure]:
    """Speed of training."""
    for side in SIDES:
        step = _median(per_round(turns[side]))
        yield Figure(
            name=f"training step, {side}",
            value=step,
            unit="s",
            definition="forward, backward, clipping, AdamW",
        )
        yield Figure(
            name=f"training, {side}",
            value=workload.tokens / step,
            unit="tokens/s",
            definition=f"{workload.tokens} tokens a step",
        )
    yield Figure(
        name="training speed, ours / theirs",
        value=ratio(per_round(turns["theirs"]), per_round(turns["ours"])),
        unit="×",
        definition="tokens/s of jmoe over tokens/s of transformers",
        at_least=1.0,
    )


def memory_figures(turns: Turns) -> Iterator[Figure]:
    """Resident memory of the training processes."""
    last = {side: turns[side][-1] for side in SIDES}
    for side in SIDES:
        yield Figure(
            name=f"peak memory, {side}",
            value=last[side].peak_bytes / 2**30,
            unit="GiB",
            definition="ru_maxrss after the last step, compilation included",
        )
        yield Figure(
            name=f"steady memory, {side}",
            value=last[side].resident_bytes / 2**30,
            unit="GiB",
            definition="resident memory between two steps, after the last round",
        )
    yield Figure(
        name="peak memory, ours / theirs",
        value=last["ours"].peak_bytes / last["theirs"].peak_bytes,
        unit="×",
        definition="peak of jmoe's process over that of transformers' process",
        at_most=1.0,
    )


def layer_figures(turns: Turns, workload: Workload) -> Iterator[Figure]:
    """One MoE layer, forward and backward."""
    linears = workload.routed_linears()
    shapes = (f"[{x.rows}, {x.inputs}]x[{x.inputs}, {x.outputs}]" for x in linears)
    definitions = {
        "ours": "jmoe's router and routed experts; gradients of input and weights",
        "theirs": "the same of transformers', grouped_mm experts",
        "compiled": "the same of transformers', after torch.compile",
        "gshard": "the same with one-hot dispatch, capacity factor 2.0, 4 groups",
        "in_place": "the experts as one batched MLP, as many rows each, nothing routed",
        "matmuls": f"plain {', '.join(shapes)}, and each one's two gradients",
    }
    seconds = {
        name: per_round(turns[name]) for name in definitions if name != "matmuls"
    }
    seconds["matmuls"] = _matmul_seconds(turns["matmuls"], linears)
    for name, definition in definitions.items():
        yield Figure(
            name=f"MoE layer, {name}",
            value=_median(seconds[name]) * 1e3,
            unit="ms",
            definition=definition,
        )
    yield Figure(
        name="MoE layer, ours / matmuls",
        value=ratio(seconds["ours"], seconds["matmuls"]),
        unit="×",
        definition="time over that of the same operations as plain dense matmuls",
        at_most=1.35,
    )
    yield Figure(
        name="MoE layer, in_place / matmuls",
        value=ratio(seconds["in_place"], seconds["matmuls"]),
        unit="×",
        definition="the same of experts alone, which route nothing",
    )
    yield Figure(
        name="MoE layer, gshard / ours",
        value=ratio(seconds["gshard"], seconds["ours"]),
        unit="×",
        definition="time of the capacity layer over jmoe's",
        at_least=2.5,
    )
    best = min(("theirs", "compiled"), key=lambda name: _median(seconds[name]))
    yield Figure(
        name="MoE layer, theirs / ours",
        value=ratio(seconds[best], seconds["ours"]),
        unit="×",
        definition="time of transformers' layer, the faster one, over jmoe's",
    )


def matmul_rates(
    turns: Sequence[Turn], linears: Sequence[Linear]
) -> dict[str, dict[str, float]]:
    """GFLOP/s of each linear map's matmuls, the median over rounds."""
    return {
        f"{linear.name} [{linear.rows}, {linear.inputs}, {linear.outputs}]": {
            name: linear.flops / 3 / linear.count / seconds / 1e9
            for name, seconds in _median_of_each([turn.result[i] for turn in turns])
        }
        for i, linear in enumerate(linears)
    }


def _median_of_each(
    rows: Sequence[Mapping[str, float]],
) -> Iterator[tuple[str, float]]:
    return ((name, _median([row[name] for row in rows])) for name in rows[0])


def _matmul_seconds(turns: Sequence[Turn], linears: Sequence[Linear]) -> list[float]:
    """Returns seconds of all linear maps and their gradients, for each round."""
    return [
        sum(
            linear.count * sum(seconds.values())
            for linear, seconds in zip(linears, turn.result, strict=True)
        )
        for turn in turns
    ]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)
