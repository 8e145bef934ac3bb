"""Training steps compiled for GPUs that aren't here, against what is asked of them.

    python scripts/check_hopper.py

Nothing runs: the figures are read off the compiled programs, and what compiling took.
"""

from collections.abc import Iterator, Sequence

from experiments.benchmarks.report import Figure, Report
from jmoe.parallel import compiler
from jmoe.plan import summary
from jmoe.plan.summary import Summary

GIB = 2**30
TOO_LARGE = "v3_16"  # known not to fit; it is compiled to see by how much


def make_report(summaries: Sequence[Summary]) -> Report:
    """Figures with their bounds, and the programs in full."""
    return Report(
        suite="hopper",
        compared=("tokamax", "jax-cuda13-plugin"),
        settings={"options": compiler.GPU_OPTIONS},
        figures=[figure for found in summaries for figure in _figures(found)],
        samples={found.run.name: found.to_dict() for found in summaries},
    )


def _figures(found: Summary) -> Iterator[Figure]:
    name = found.run.name
    yield Figure(
        name=f"{name}: memory",
        value=found.memory.total / GIB,
        unit="GiB",
        definition="arguments, outputs that replace none, temporaries; of one device",
        at_most=None if name == TOO_LARGE else found.device.memory_bytes / GIB,
    )
    yield Figure(
        name=f"{name}: dispatch",
        value=summary.dispatch_ratio(found),
        unit="x",
        definition="bytes sent to experts, over those of tokens that travel once to "
        "each device that they need, if all experts are alike",
        at_most=1.1,
    )
    yield Figure(
        name=f"{name}: gathered batches or weights",
        value=len(summary.batch_gathers(found)),
        unit="",
        definition="all-gathers in the passes, over axes that divide the batch",
        at_most=0,
    )
    backward = [
        c
        for c in found.collectives
        if c.phase == "backward" and c.kind.endswith("all-to-all")
    ]
    yield Figure(
        name=f"{name}: hidden exchanges",
        value=summary.hidden(backward),
        unit="share",
        definition="of the backward pass's all-to-alls, those with a GEMM meanwhile",
        at_least=0.5 if name == "v2_lite_16" else None,
    )
    is_largest = name == "v3_2048"
    yield Figure(
        name=f"{name}: time to compile",
        value=found.seconds,
        unit="s",
        definition="tracing, lowering and compiling",
        at_most=180 if is_largest else None,
    )
    yield Figure(
        name=f"{name}: memory to compile",
        value=found.host_bytes / GIB,
        unit="GiB",
        definition="the most that the compiling process had",
        at_most=4 if is_largest else None,
    )
