"""The steps that `docs/numerics.md` speaks of, compiled; and its tables.

Two meshes between them have all axes, a pipeline, and every loss.
"""

import collections
import pathlib
import re
import runpy

from jmoe.config import override
from jmoe.plan import aot, numerics, traffic

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "numerics.md"
EXPERIMENT = pathlib.Path(__file__).parent / "smallest_run.py"
KEYS = {
    "Between devices": ("what", "collective"),
    "On a device": ("where", "operation"),
}
MESHES = ("data=2,expert=4,tensor=2", "pipe=2,data=2,expert=2,tensor=2")


def found_in(
    devices, dtype: str, backend: str
) -> tuple[set[numerics.Travel], set[numerics.Local]]:
    """What the steps on `MESHES` send, and what they compute locally."""
    run = runpy.run_path(str(EXPERIMENT))["get_config"]()
    travels, local = set(), set()
    for mesh in MESHES:
        changed = override(
            run,
            [
                "model.vocab_size=304",
                "model.num_layers=3",
                "model.attention.num_heads=4",
                "model.moe.router.auxiliary_loss=sequence",
                "model.moe.router.auxiliary_weight=1e-4",
                "model.moe.router.z_loss_weight=1e-4",
                f"model.moe.backend={backend}",
                f"model.dtype={dtype}",
                "data.sequence_length=16",
                "train.batch_size=16",
                "train.microbatch_size=8",
                "train.ramp_start=none",
                *(f"mesh.{axis}" for axis in mesh.split(",")),
            ],
        )
        text = aot.compile_step(changed, devices).text
        travels |= numerics.travels(traffic.collectives(text, changed.mesh.shape))
        local |= numerics.local(text)
    return travels, local


def table(title: str) -> list[dict[str, str]]:
    """The rows of the document's table under this heading, by column."""
    section = DOCUMENT.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ") for line in section.splitlines() if line[:1] == "|"]
    header, _, *rows = (re.split(r"\s*\|\s*", line) for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def words(cell: str) -> set[str]:
    """The items of a cell that lists some."""
    return {word.strip() for word in cell.split(",")} - {"none"}


def assert_travels(found: set[numerics.Travel], run: str) -> None:
    """Asserts that the document's column `run` has just these, with their axes."""
    seen = collections.defaultdict(lambda: (set(), set()))
    for travel in found:
        dtypes, axes = seen[travel.carried, travel.kind]
        dtypes.add(travel.dtype)
        axes.update(travel.axes)
    said = {
        (row["what"], row["collective"]): (words(row[run]), words(row["along"]))
        for row in table("Between devices")
    }
    assert dict(seen) == said


def assert_local(found: set[numerics.Local], run: str) -> None:
    """Asserts that the document's column `run` has these, and no others."""
    seen = collections.defaultdict(set)
    for one in found:
        seen[one.place, one.operation].add(one.dtype)
    rows = {(row["where"], row["operation"]): row for row in table("On a device")}
    said = {key: words(row[run]) for key, row in rows.items() if words(row[run])}
    assert dict(seen) == said
