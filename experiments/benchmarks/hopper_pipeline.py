"""Steps through a pipeline, compiled for 16 GPUs that aren't here.

    python scripts/check_hopper.py --suite=pipeline

All schedules at one model and mesh, for the memory that each takes; and DualPipe's
overlapped loop, for what its collectives have to hide behind. That loop takes a layer
of one microbatch forward and a layer of another back at a time: a collective of one
direction is hidden by the other if one of its matrix products is between start and end.
"""

from collections.abc import Iterator, Sequence

import rich.console

from experiments.benchmarks.report import Figure, Report
from jmoe.parallel import compiler
from jmoe.plan import pipelined, programs, summary, tables
from jmoe.plan.summary import Summary

GIB, MIB = 2**30, 2**20
ASKED = "dualpipe_pp4_ep4", "dualpipe_pp2_tp8"


def run(names: Sequence[str], console: rich.console.Console) -> Report:
    """Compiles these of `programs.PIPELINES`, and prints what they take."""
    summaries = []
    for name in names:
        console.print(f"Compiling {name} ...")
        run = programs.PIPELINES[name]()
        summaries.append(summary.apart(summary.compile_run, run))
    tables.show_pipelines(summaries, console)
    return make_report(summaries)


def make_report(summaries: Sequence[Summary]) -> Report:
    """Figures with their bounds, and the programs in full."""
    return Report(
        suite="hopper_pipeline",
        compared=("jax-cuda13-plugin",),
        settings={"options": compiler.GPU_OPTIONS},
        figures=[figure for found in summaries for figure in _figures(found)],
        samples={found.run.name: _sample(found) for found in summaries},
    )


def _figures(found: Summary) -> Iterator[Figure]:
    name = found.run.name
    yield Figure(
        name=f"{name}: temporaries",
        value=found.memory.temporaries / GIB,
        unit="GiB",
        definition="what a device needs while the step runs, beside its arguments",
    )
    yield Figure(
        name=f"{name}: might wait",
        value=len(pipelined.waiting(found.collectives)),
        unit="",
        definition="collectives between ranks of the pipeline, in a loop or branch "
        "that a rank might skip",
        at_most=0,
    )
    yield Figure(
        name=f"{name}: copied",
        value=found.copied_bytes / MIB,
        unit="MiB",
        definition="the largest array that a loop copies as it is",
        at_most=_layer_bytes(found) / MIB,
    )
    for row in pipelined.overlaps(found.collectives):
        yield Figure(
            name=f"{name}: {row.phase}, {row.kind} hidden",
            value=row.crossing,
            unit="",
            definition="of the bytes that it sends in the overlapped loop, those "
            "beside a GEMM of the other direction",
            at_least=0.5 if name in ASKED else None,
        )


def _layer_bytes(found: Summary) -> int:
    """Eight times what passes between two layers: far less than stashes have."""
    cfg, mesh = found.run.model, found.run.mesh
    positions = found.run.data.sequence_length // mesh.tensor
    return 8 * positions * cfg.hidden_dim * {"float32": 4, "bfloat16": 2}[cfg.dtype]


def _sample(found: Summary) -> dict:
    pipeline = found.run.pipeline
    overlapped = pipelined.overlapped(found.collectives)
    return found.to_dict() | {
        "schedule": pipeline.schedule,
        "remat": found.run.model.remat,
        "stage_remat": pipeline.remat,
        "overlapped": [pipelined.row(c) for c in overlapped],
    }
