"""What an export would write, from shapes alone: no weights, no devices."""

import math
import re

import rich.table

from jmoe.config import ModelConfig
from jmoe.data.formatting import count
from jmoe.export import names, published, write
from jmoe.export.layout import CODES, FileEntry
from jmoe.export.numerics import FLOAT32
from jmoe.export.write import Plan

# What a plan can be held against: of which preset, and written how.
PUBLISHED = ("v3", "fp8")


def plan_preset(model: str, dtype: str) -> Plan:
    """Returns the plan of a preset with float32 parameters.

    Raises:
      ValueError: no such preset or type; or the plan is that of a published checkpoint,
        and differs.
    """
    cfg = ModelConfig.preset(model)
    leaf_dtypes = dict.fromkeys(names.abstract_leaves(cfg), FLOAT32)
    made = write.plan(names.expand(cfg), leaf_dtypes, dtype=dtype)
    if (model, dtype) == PUBLISHED:
        problems = published.differences(made.entries)
        if problems:
            title = f"{len(problems)} differences from the published checkpoint:"
            raise ValueError("\n  ".join([title, *problems[:20]]))
    return made


def table(made: Plan) -> rich.table.Table:
    """Returns a row for each kind of tensor: name, type, shape, number, size."""
    kinds: dict[tuple, list[FileEntry]] = {}
    for entry in made.entries:
        name = re.sub(r"\d+", "N", entry.name)
        kinds.setdefault((name, entry.dtype, entry.shape), []).append(entry)
    found = rich.table.Table()
    for title in ("tensor", "type", "shape"):
        found.add_column(title, overflow="fold")
    for title in ("how many", "GB"):
        found.add_column(title, justify="right")
    for (name, dtype, shape), entries in sorted(kinds.items(), key=str):
        size = sum(entry.nbytes for entry in entries) / 1e9
        row = (CODES[dtype], str(list(shape)), f"{len(entries):,}", f"{size:,.3f}")
        found.add_row(name, *row)
    return found


def summary(made: Plan) -> str:
    """Returns one line: tensors, parameters, bytes, files."""
    entries = made.entries
    parameters = sum(
        math.prod(entry.shape) for entry in entries if entry.name in made.dtypes
    )
    return (
        f"{len(entries):,} tensors of {count(parameters)} parameters, "
        f"{made.size / 1e9:,.2f} GB in {len(made.shards)} files"
    )
