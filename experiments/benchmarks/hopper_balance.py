"""Lent experts, compiled for GPUs that aren't here, against two other exchanges.

    python scripts/check_hopper.py --suite=balance

One lends experts, so that all devices compute as many rows. Of the others, one drops
what is more than 1.05 times the expected, and one has room for whatever comes. Compiled
are an MoE layer of DeepSeek-V3's shape, forward and backward, and V2-Lite's training
step, which lends in FP8 too. Read off the programs are the memory that they need
besides weights and results, and whether products hide the way of lent weights and of
their gradients. A plan of loans is compiled besides, and its kernels are counted.

What travels depends on the data: that of loans is given for full slots, that of tokens
for experts that are all chosen alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.console

from experiments.benchmarks.report import Figure, Report
from jmoe.balance import dropping
from jmoe.parallel import compiler
from jmoe.plan import decision, hlo, layers, programs, summary
from jmoe.plan.decision import PlanCost
from jmoe.plan.summary import Summary
from jmoe.plan.traffic import Collective

GIB, MB = 2**30, 10**6
ITEM_BYTES = 2  # of tokens in bfloat16
MOST_OF_CAPACITY, MOST_OF_DROPLESS = 1.1, 0.5
SUFFIX = "_balanced"
E4M3 = "f8e4m3fn["

# What travels of experts, its definition, and how many products should hide it.
LOANS: Mapping[str, tuple[str, int | None]] = {
    "lent": ("weights that are lent in the forward pass", 1),
    "lent again": ("weights that are lent once more for the backward pass", None),
    "given back": ("gradients of lent weights", 1),
}


def run(names: Sequence[str], console: rich.console.Console) -> Report:
    """Compiles these of `programs.LAYERS` and `programs.LENDING_STEPS`."""
    found = {}
    costs = {}
    for name in names:
        console.print(f"Compiling {name} ...")
        if name in programs.LAYERS:
            asked = programs.LAYERS[name]()
            found[name] = summary.apart(layers.compile_layer, asked)
            if name.endswith(SUFFIX):
                costs[name] = summary.apart(decision.plan_cost, asked)
        else:
            asked = programs.LENDING_STEPS[name]()
            found[name] = summary.apart(summary.compile_run, asked)
    return make_report(found, costs)


def make_report(found: Mapping[str, Summary], costs: Mapping[str, PlanCost]) -> Report:
    """Returns figures with their bounds, and the programs in full."""
    figures = [figure for name in found for figure in _memory(name, found)]
    for name, program in found.items():
        if name.endswith(SUFFIX):
            figures += [*_bytes(name, program), *_loans(name, program)]
            figures += _in_fp8(name, found)
        if name in costs:
            figures += _planning(name, costs[name])
    return Report(
        suite="hopper_balance",
        compared=("jax-cuda13-plugin",),
        settings={"options": compiler.GPU_OPTIONS},
        figures=figures,
        samples={name: _sample(program) for name, program in found.items()},
    )


def _sample(program: Summary) -> dict[str, Any]:
    spans = {what: [c.gemms for c in of_loans(program, what)] for what in LOANS}
    return program.to_dict() | {"products_that_loans_span": spans}


def _memory(name: str, found: Mapping[str, Summary]) -> Iterator[Figure]:
    """Yields a program's temporaries, and their ratio to those of the others."""
    temporaries = found[name].memory.temporaries
    yield Figure(
        name=f"{name}: temporaries",
        value=temporaries / GIB,
        unit="GiB",
        definition="of a device, beside arguments and outputs",
    )
    if not name.endswith(SUFFIX):
        return
    for kind, at_most in (
        ("capacity", MOST_OF_CAPACITY),
        ("dropless", MOST_OF_DROPLESS),
    ):
        other = found.get(f"{name.removesuffix(SUFFIX)}_{kind}")
        if other is not None:
            yield Figure(
                name=f"{name}: temporaries / {kind}'s",
                value=temporaries / other.memory.temporaries,
                unit="x",
                definition="of the same program with the other exchange",
                at_most=at_most,
            )


def _bytes(name: str, program: Summary) -> Iterator[Figure]:
    """Yields what a device borrows and what it sends of tokens, in one layer."""
    asked = program.run
    peers, cfg = asked.mesh.expert, asked.model
    yield Figure(
        name=f"{name}: bytes of loans",
        value=_lent_bytes(program) / MB,
        unit="MB",
        definition="of as many experts as a device can borrow, as they travel in a "
        "layer's forward pass",
    )
    others = float(dropping.expected_visits(cfg.moe.router, peers)) * (1 - 1 / peers)
    tokens = asked.data.sequence_length / asked.mesh.tensor
    yield Figure(
        name=f"{name}: bytes of tokens",
        value=tokens * others * cfg.hidden_dim * ITEM_BYTES / MB,
        unit="MB",
        definition="to other devices, if all experts are alike, in a layer's forward "
        "pass; as many come back",
    )


def _lent_bytes(program: Summary) -> int:
    """Returns bytes of as many experts as a device can borrow, in one layer."""
    return sum(c.operand_bytes // _experts(c) for c in of_loans(program, "lent"))


def _in_fp8(name: str, found: Mapping[str, Summary]) -> Iterator[Figure]:
    """Yields what FP8 leaves of the loans' bytes in bfloat16, and how much it is."""
    program = found[name]
    if program.run.precision == "native":
        return
    loans = of_loans(program, "lent")
    narrow = [c for c in loans if c.shapes[0].startswith(E4M3)]
    yield Figure(
        name=f"{name}: loans in e4m3",
        value=sum(c.operand_bytes for c in narrow)
        / sum(c.operand_bytes for c in loans),
        unit="",
        definition="of the bytes of loans; what else there is are scales of blocks",
        at_least=0.999,
    )
    native = found.get(name.replace("_fp8", ""))
    if native is not None:
        yield Figure(
            name=f"{name}: bytes of loans / bfloat16's",
            value=_lent_bytes(program) / _lent_bytes(native),
            unit="x",
            definition="of the same program in bfloat16",
            at_most=0.501,
        )


def _planning(name: str, cost: PlanCost) -> Iterator[Figure]:
    """Yields what a plan of loans costs, against the layer's least time."""
    yield Figure(
        name=f"{name}: a plan's kernels",
        value=cost.kernels,
        unit="",
        definition="of `lending.plan`, which every device computes from all counts",
        at_most=20,
    )
    yield Figure(
        name=f"{name}: a plan's time",
        value=1e6 * cost.seconds,
        unit="us",
        definition=f"{1e6 * decision.LAUNCH_SECONDS:g} us a kernel, and the "
        f"{cost.moved_bytes / 1000:,.0f} kB that they read and write at full bandwidth",
    )
    yield Figure(
        name=f"{name}: a plan's time / the layer's floor",
        value=100 * cost.seconds / cost.floor_seconds,
        unit="%",
        definition=f"the floor is {1e3 * cost.floor_seconds:.1f} ms: products of "
        "routed and shared experts, forward and backward, at 148 TFLOP/s",
        at_most=1.0,
    )


def _loans(name: str, program: Summary) -> Iterator[Figure]:
    """Yields what hides the loans' way, and the gathers, of which there are none."""
    for what, (definition, at_least) in LOANS.items():
        loans = of_loans(program, what)
        if not loans:
            continue
        yield Figure(
            name=f"{name}: products meanwhile, {what}",
            value=max(c.gemms or 0 for c in loans),
            unit="",
            definition="between start and end of a collective, the most that one of "
            f"{definition} spans; of loops over what is rare, one turn counts",
            at_least=at_least,
        )
        yield Figure(
            name=f"{name}: hidden, {what}",
            value=summary.hidden(loans),
            unit="",
            definition=f"of {definition}, {len(loans)} a layer, those that span a "
            "product",
        )
    yield Figure(
        name=f"{name}: gathers",
        value=len(summary.batch_gathers(program)),
        unit="",
        definition="all-gathers in the passes, of weights or of other devices' tokens",
        at_most=0,
    )


def of_loans(program: Summary, what: str) -> list[Collective]:
    """Returns ragged all-to-alls of experts, without those of rare further parts.

    A device puts in all of its experts to lend some, but one at a time to give its
    gradient back. Rows of tokens have one dimension less.
    """
    own = program.run.model.moe.router.num_experts // program.run.mesh.expert
    found = [
        c
        for c in program.collectives
        if c.kind == "ragged-all-to-all"
        and not c.optional
        and len(hlo.dimensions(c.shapes[0])) > 2
    ]
    lent = [c for c in found if _experts(c) == own]
    # Where a program's weights come from tells no phase: these are the first pass's.
    again = [c for c in lent if c.phase == "backward"]
    return {
        "lent": [c for c in lent if c not in again],
        "lent again": again,
        "given back": [c for c in found if _experts(c) == 1],
    }[what]


def _experts(collective: Collective) -> int:
    return hlo.dimensions(collective.shapes[0])[0]
