"""Steps of a decoder, compiled for 16 GPUs that aren't here.

    python scripts/check_hopper.py --suite=decode

DeepSeek-V3 with weights in FP8, divided over 8 devices by tensor and over two ranks of
a pipeline: a token of each of 32 sequences, the same with a draft of the next, and with
256 tokens of a prompt beside them. Read off the programs are what a device holds, and
what travels: no weights, and no logits.
"""

from collections.abc import Iterator, Sequence

import rich.console
import rich.table

from experiments.benchmarks.report import Figure, Report
from jmoe.parallel import compiler
from jmoe.plan import decoding, programs, summary
from jmoe.plan.decoding import Summary

GB, MB = 10**9, 10**6


def run(names: Sequence[str], console: rich.console.Console) -> Report:
    """Compiles these of `programs.DECODERS`, and prints what they take."""
    summaries = []
    for name in names:
        console.print(f"Compiling {name} ...")
        asked = programs.DECODERS[name]()
        summaries.append(summary.apart(decoding.compile_decoding, asked))
    console.print(memory_table(summaries))
    console.print(traffic_table(summaries))
    return make_report(summaries)


def make_report(summaries: Sequence[Summary]) -> Report:
    """Figures with their bounds, and the programs in full."""
    return Report(
        suite="hopper_decode",
        compared=("jax-cuda13-plugin",),
        settings={"options": compiler.GPU_OPTIONS},
        figures=[figure for found in summaries for figure in _figures(found)],
        samples={found.decoding.run.name: found.to_dict() for found in summaries},
    )


def memory_table(summaries: Sequence[Summary]) -> rich.table.Table:
    """Returns what a device holds while each of the steps runs."""
    table = rich.table.Table(title="Memory of a device, GB", title_justify="left")
    table.add_column("step", overflow="fold")
    names = ("positions", "weights", "cache", "temporaries", "total", "of", "compiled")
    for name in names:
        table.add_column(name, justify="right")
    for found in summaries:
        memory = found.memory
        sizes = memory.weights, memory.cache, memory.temporaries, memory.total
        table.add_row(
            found.decoding.run.name,
            f"{found.decoding.positions:,}",
            *(f"{size / GB:.1f}" for size in sizes),
            f"{found.device.memory_bytes / GB:.0f}",
            f"{found.seconds:.0f} s",
        )
    return table


def traffic_table(summaries: Sequence[Summary]) -> rich.table.Table:
    """Returns the collectives of each of the steps."""
    table = rich.table.Table(
        title="A step's collectives, and MB that a device sends", title_justify="left"
    )
    table.add_column("step", overflow="fold")
    table.add_column("kind")
    for name in ("times", "MB"):
        table.add_column(name, justify="right")
    for found in summaries:
        for kind, (times, sent) in sorted(found.traffic().items()):
            row = kind, f"{times:,}", f"{sent / MB:.3f}"
            table.add_row(found.decoding.run.name, *row)
    return table


def _figures(found: Summary) -> Iterator[Figure]:
    name, memory = found.decoding.run.name, found.memory
    yield Figure(
        name=f"{name}: memory",
        value=memory.total / GB,
        unit="GB",
        definition="arguments, outputs that replace none, temporaries; of one device",
        at_most=found.device.memory_bytes / GB,
    )
    for what in ("weights", "cache", "temporaries"):
        yield Figure(
            name=f"{name}: {what}",
            value=getattr(memory, what) / GB,
            unit="GB",
            definition="of that memory",
        )
    yield Figure(
        name=f"{name}: positions",
        value=found.decoding.positions,
        unit="",
        definition="that the cache has room for",
    )
    traffic = found.traffic()
    yield Figure(
        name=f"{name}: collectives",
        value=sum(times for times, _ in traffic.values()),
        unit="",
        definition="in a step, by a device that has all of its parts",
    )
    yield Figure(
        name=f"{name}: traffic",
        value=sum(sent for _, sent in traffic.values()) / MB,
        unit="MB",
        definition="that a device sends in a step",
    )
    yield Figure(
        name=f"{name}: large gathers",
        value=len(found.large_gathers()),
        unit="",
        definition="all-gathers of more than hidden states of the step's tokens: of "
        "weights or logits",
        at_most=0,
    )
