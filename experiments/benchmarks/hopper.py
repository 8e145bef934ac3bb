"""Training steps compiled for GPUs that aren't here, against what is asked of them.

    python scripts/check_hopper.py

Nothing runs: the figures are read off the compiled programs, and what compiling took.
"""

from collections.abc import Iterator, Mapping, Sequence

import rich.console

from experiments.benchmarks.report import Figure, Report
from jmoe.parallel import compiler
from jmoe.plan import programs, summary, tables
from jmoe.plan.summary import Summary
from jmoe.plan.traffic import Collective

GIB = 2**30
FITTING = "v2_lite_16", "moonlight_16", "qwen3_30b_16", "v3_2048"
ON_TWO_NODES = "v2_lite_16", "v3_16"
OVERLAPPING = ("v2_lite_16",)  # where memory is short, XLA overlaps nothing
LARGEST = ("v3_2048",)


def run(names: Sequence[str], console: rich.console.Console) -> Report:
    """Compiles these of `programs.PROGRAMS`, and prints what each takes."""
    summaries = []
    for name in names:
        console.print(f"Compiling {name} ...")
        found = summary.apart(summary.compile_run, programs.PROGRAMS[name]())
        tables.show(found, console)
        summaries.append(found)
    optimizer_by_data = {
        nodes: summary.apart(summary.optimizer_bytes, programs.v2_lite(nodes=nodes))
        for nodes in (1, 2, 4)
    }
    muon = summary.apart(summary.compile_optimizer, programs.v2_lite_muon())
    return make_report(summaries, optimizer_by_data, muon)


def make_report(
    summaries: Sequence[Summary], optimizer_by_data: Mapping[int, int], muon: Summary
) -> Report:
    """Figures with their bounds, and the programs in full.

    Args:
      optimizer_by_data: bytes of the optimizer's on a device, by the data axis's size.
      muon: of a program that is its step alone.
    """
    figures = [figure for found in summaries for figure in _figures(found)]
    return Report(
        suite="hopper",
        compared=("jax-cuda13-plugin",),
        settings={"options": compiler.GPU_OPTIONS},
        figures=[*figures, _zero(optimizer_by_data), *_muon(muon)],
        samples={found.run.name: found.to_dict() for found in summaries}
        | {"optimizer_bytes_by_data": dict(optimizer_by_data)}
        | {muon.run.name: muon.to_dict()},
    )


def _figures(found: Summary) -> Iterator[Figure]:
    name = found.run.name
    yield Figure(
        name=f"{name}: memory",
        value=found.memory.total / GIB,
        unit="GiB",
        definition="arguments, outputs that replace none, temporaries; of one device",
        at_most=found.device.memory_bytes / GIB if name in FITTING else None,
    )
    yield Figure(
        name=f"{name}: state",
        value=summary.held_ratio(found.memory),
        unit="x",
        definition="bytes of weights, moments and reduced gradients on a device, over "
        "those that it would have if they were evenly divided",
        at_most=1.03,
    )
    sums = summary.gradient_sums(found)
    yield Figure(
        name=f"{name}: bfloat16 sums",
        value=len(summary.in_bfloat16(sums)),
        unit="",
        definition="collectives that sum gradients of weights in bfloat16",
        at_most=0,
    )
    yield Figure(
        name=f"{name}: all-reduced",
        value=_sent([c for c in sums if c.kind == "all-reduce"]) / _sent(sums),
        unit="",
        definition="of the bytes sent to sum gradients, those of all-reduces, after "
        "which devices have copies",
        at_most=1e-3,
    )
    yield Figure(
        name=f"{name}: dispatch",
        value=summary.dispatch_ratio(found),
        unit="x",
        definition="bytes sent to experts, over those of tokens that travel once to "
        "each device that they need, if all experts are alike",
        at_most=1.1 if name in ON_TWO_NODES else None,
    )
    yield Figure(
        name=f"{name}: gathers",
        value=len(summary.batch_gathers(found)),
        unit="",
        definition="all-gathers in the passes, of weights or of other devices' tokens",
        at_most=0,
    )
    exchanges = [
        c
        for c in found.collectives
        if c.phase == "backward" and c.kind.endswith("all-to-all")
    ]
    yield Figure(
        name=f"{name}: hidden",
        value=summary.hidden(exchanges),
        unit="",
        definition="of the backward pass's all-to-alls, those with a GEMM meanwhile",
        at_least=0.5 if name in OVERLAPPING else None,
    )
    yield Figure(
        name=f"{name}: compiling",
        value=found.seconds,
        unit="s",
        definition="tracing, lowering and compiling",
        at_most=180 if name in LARGEST else None,
    )
    yield Figure(
        name=f"{name}: compiling",
        value=found.host_bytes / GIB,
        unit="GiB",
        definition="the most memory that the compiling process had",
        at_most=4 if name in LARGEST else None,
    )


def _sent(collectives: Sequence[Collective]) -> int:
    return sum(c.times * c.moved_bytes for c in collectives)


def _zero(optimizer_by_data: Mapping[int, int]) -> Figure:
    alone = optimizer_by_data[1]
    off = [abs(held * data / alone - 1) for data, held in optimizer_by_data.items()]
    return Figure(
        name="v2_lite: optimizer's memory",
        value=max(off),
        unit="",
        definition="how far off 1 / n of a device's memory it is on n times the data "
        "axis, at most",
        at_most=0.05,
    )


def _muon(found: Summary) -> Iterator[Figure]:
    name = found.run.name
    yield Figure(
        name=f"{name}: optimizer's temporaries",
        value=found.memory.temporaries / GIB,
        unit="GiB",
        definition="of its step alone, beside weights, gradients and its state",
        at_most=2.0,
    )
    yield Figure(
        name=f"{name}: optimizer's gathers",
        value=sum(c.kind == "all-gather" for c in found.collectives),
        unit="",
        definition="all-gathers in its step alone",
        at_most=0,
    )
    yield Figure(
        name=f"{name}: optimizer's traffic",
        value=sum(c.times * c.moved_bytes for c in found.collectives) / GIB,
        unit="GiB",
        definition="that a device sends in its step alone, to share out matrices",
    )
