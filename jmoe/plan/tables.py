"""Summaries of compiled steps, as tables for people."""

from collections.abc import Iterator, Sequence

import rich.console
import rich.table

from jmoe.config import RunConfig
from jmoe.plan import pipelined
from jmoe.plan.summary import Summary

GIB = 2**30


def show(summary: Summary, console: rich.console.Console) -> None:
    """Prints what one program needs and moves."""
    run, memory = summary.run, summary.memory
    console.print(
        f"[bold]{run.name}[/]: {run.mesh.num_devices} x {summary.device.name}, "
        f"{_mesh(run)}; "
        f"{run.train.batch_size} sequences of {run.data.sequence_length} a step"
    )
    console.print(
        f"Compiled in {summary.seconds:.0f} s with {summary.host_bytes / GIB:.1f} GiB "
        "of host memory."
    )
    console.print(_memory_table(summary))
    verdict = "[green]fits[/]" if summary.fits else "[red]does not fit[/]"
    console.print(
        f"{memory.total / GIB:.1f} of {summary.device.memory_bytes / GIB:.1f} GiB: "
        f"{verdict}."
    )
    console.print(_traffic_table(summary))


def _mesh(run: RunConfig) -> str:
    return ", ".join(f"{axis}={n}" for axis, n in run.mesh.shape.items() if n > 1)


def _memory_table(summary: Summary) -> rich.table.Table:
    table = rich.table.Table(title="Memory of a device", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for what, size in _memory_rows(summary):
        table.add_row(what, f"{size / GIB:.2f}")
    return table


def _memory_rows(summary: Summary) -> Iterator[tuple[str, float]]:
    memory = summary.memory
    yield "arguments", memory.arguments
    yield "  of these, parameters (float32)", memory.parameters
    yield "    evenly divided", memory.parameters_even
    yield "  of these, the optimizer's", memory.optimizer
    yield "    evenly divided", memory.optimizer_even
    yield "outputs that replace no argument", memory.outputs - memory.aliased
    yield "temporaries", memory.temporaries
    yield "total", memory.total


def _traffic_table(summary: Summary) -> rich.table.Table:
    table = rich.table.Table(
        title="A step's collectives: GiB that a device sends, and the share of them "
        "with GEMMs meanwhile",
        title_justify="left",
    )
    for name in ("phase", "kind", "axes"):
        table.add_column(name, no_wrap=True)
    for name in ("times", "GiB", "hidden"):
        table.add_column(name, justify="right")
    for row in summary.traffic():
        table.add_row(
            row.phase,
            row.kind,
            ",".join(row.axes),
            f"{row.times:,}",
            f"{row.sent_bytes / GIB:.3f}",
            f"{row.hidden:.0%}",
        )
    return table


def show_pipelines(summaries: Sequence[Summary], console: rich.console.Console) -> None:
    """Prints the memory of several pipelines, and what overlaps in those that do."""
    console.print(_schedules_table(summaries))
    console.print(_overlap_table(summaries))
    console.print(
        "A rank runs its layers in loops whose lengths the program doesn't know; bytes "
        "are for one turn, a layer of each of two microbatches."
    )


def _schedules_table(summaries: Sequence[Summary]) -> rich.table.Table:
    table = rich.table.Table(
        title="Memory of a device by schedule, GiB", title_justify="left"
    )
    for name in ("schedule", "mesh", "F leaves"):
        table.add_column(name, no_wrap=True)
    for name in ("microbatches", "arguments", "temporaries", "total", "compiled"):
        table.add_column(name, justify="right")
    for found in summaries:
        run, memory = found.run, found.memory
        inputs = {"block": "layers' inputs", "none": "all"}
        left = inputs.get(run.model.remat, run.model.remat)
        table.add_row(
            run.pipeline.schedule,
            _mesh(run),
            "stages' inputs" if run.pipeline.remat == "stage" else left,
            f"{run.train.batch_size // run.train.microbatch_size}",
            f"{memory.arguments / GIB:.1f}",
            f"{memory.temporaries / GIB:.1f}",
            f"{memory.total / GIB:.1f}" + ("" if found.fits else " (too much)"),
            f"{found.seconds:.0f} s",
        )
    return table


def _overlap_table(summaries: Sequence[Summary]) -> rich.table.Table:
    table = rich.table.Table(
        title="The overlapped loop's collectives, and the share of their bytes beside "
        "a GEMM of the other direction",
        title_justify="left",
    )
    for name in ("program", "direction", "kind", "axes"):
        table.add_column(name, no_wrap=True)
    for name in ("count", "MiB", "hidden"):
        table.add_column(name, justify="right")
    for found in summaries:
        for row in pipelined.overlaps(found.collectives):
            table.add_row(
                found.run.name,
                row.phase,
                row.kind,
                ",".join(row.axes),
                f"{row.count}",
                f"{row.sent_bytes / 2**20:.1f}",
                f"{row.crossing:.0%}",
            )
    return table
