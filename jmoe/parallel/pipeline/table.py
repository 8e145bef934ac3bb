"""Ticks as arrays that a compiled program reads.

Shapes: G group of layers; all else is by tick and rank, and a rank's row of it scalar.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.parallel import collectives
from jmoe.parallel.pipeline.model import LayerGroup
from jmoe.parallel.schedule.ticks import Entry, Ticks


class Instruction(NamedTuple):
    """A pass of a tick; all zeros if there is none, but for F's `kept`.

    That is then a slot that nobody reads.

    start_G, count_G: rows of its stage's layers. microbatch, and the slots source, kept
    and owed, are as in `schedule.ticks.Entry`. first, last: whether its stage is.
    """

    start_G: Any
    count_G: Any
    microbatch: Any
    source: Any
    kept: Any
    owed: Any
    first: Any
    last: Any


class Row(NamedTuple):
    """A tick. pairs: how many layers of F and of B to overlap.

    for_f, for_b: for each way that results come, the inbox slot for what comes.
    """

    f: Instruction
    b: Instruction
    w: Instruction
    pairs: Any
    for_f: dict[int, Any]
    for_b: dict[int, Any]


def own_rows(ticks: Ticks, groups: Sequence[LayerGroup], axis: str) -> Row:
    """Returns this rank's rows, int32 [tick, ...]."""
    rank = collectives.axis_index(axis)
    return jax.tree.map(lambda x: jnp.asarray(x)[:, rank], make_table(ticks, groups))


def make_table(ticks: Ticks, groups: Sequence[LayerGroup]) -> Row:
    """Returns all ranks' rows, int32 [tick, rank, ...]."""
    size = (ticks.count, ticks.schedule.num_ranks)

    def zeros(*more: int) -> np.ndarray:
        return np.zeros((*size, *more), np.int32)

    def instruction() -> Instruction:
        scalars = [zeros() for _ in Instruction._fields[2:]]
        return Instruction(zeros(len(groups)), zeros(len(groups)), *scalars)

    def inboxes(kind: str, slots: int) -> dict[int, np.ndarray]:
        # Where nothing comes, something does all the same: to a slot that nobody reads.
        return {way: np.full(size, slots, np.int32) for way in ticks.ways(kind)}

    row = Row(
        f=instruction(),
        b=instruction(),
        w=instruction(),
        pairs=zeros(),
        for_f=inboxes("F", ticks.forward_slots),
        for_b=inboxes("B", ticks.backward_slots),
    )
    row.f.kept.fill(ticks.kept_slots)
    for tick, ranks in enumerate(ticks.entries):
        for rank, entries in enumerate(ranks):
            for entry in entries:
                _fill(row, ticks, groups, (tick, rank), entry)
            task = ticks.tasks[tick][rank]
            if task is not None and task.kind == "F&BW":
                counts = row.f.count_G[tick, rank, -1], row.b.count_G[tick, rank, -1]
                row.pairs[tick, rank] = min(counts)
    return row


def _fill(
    row: Row,
    ticks: Ticks,
    groups: Sequence[LayerGroup],
    at: tuple[int, int],
    entry: Entry,
) -> None:
    step, (tick, rank) = entry.step, at
    into = {"F": row.f, "B": row.b, "W": row.w}[step.kind]
    for g, group in enumerate(groups):
        into.start_G[tick, rank, g] = group.start[rank, entry.hosted]
        into.count_G[tick, rank, g] = group.count[rank, entry.hosted]
    into.microbatch[at] = step.microbatch
    into.source[at] = entry.source or 0
    into.kept[at] = entry.kept
    into.owed[at] = entry.owed or 0
    into.first[at] = step.stage == 0
    into.last[at] = step.stage == ticks.schedule.num_stages - 1
    if entry.delivery is not None:
        inbox = row.for_f if step.kind == "F" else row.for_b
        receiver = (rank + entry.delivery.way) % ticks.schedule.num_ranks
        inbox[entry.delivery.way][tick, receiver] = entry.delivery.slot
