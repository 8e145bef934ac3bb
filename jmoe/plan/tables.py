"""Summaries of compiled steps, as tables for people."""

from collections.abc import Iterator

import rich.console
import rich.table

from jmoe.plan.summary import Summary

GIB = 2**30


def show(summary: Summary, console: rich.console.Console) -> None:
    """Prints what one program needs and moves."""
    run, memory = summary.run, summary.memory
    mesh = ", ".join(f"{axis}={n}" for axis, n in run.mesh.shape.items() if n > 1)
    console.print(
        f"[bold]{run.name}[/]: {run.mesh.num_devices} x {summary.device.name}, {mesh}; "
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


def _memory_table(summary: Summary) -> rich.table.Table:
    table = rich.table.Table(title="Memory of a device", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for what, size in _memory_rows(summary):
        table.add_row(what, f"{size / GIB:.2f}")
    return table


def _memory_rows(summary: Summary) -> Iterator[tuple[str, int]]:
    memory = summary.memory
    yield "arguments", memory.arguments
    yield "  of these, parameters (float32)", memory.parameters
    yield "  of these, the optimizer's", memory.optimizer
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
