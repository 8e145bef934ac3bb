"""Export and import against a plain copy of the same bytes on the same disk.

    python scripts/bench.py --suite=convert

A checkpoint of random float32 weights, 2.2 GB, is exported to safetensors and imported
again; beside them the exported directory is copied as it is, file by file, by the
system (`shutil.copyfile`), and once more past the page cache, which on some machines is
faster by far. Sides are processes of their own, and take a turn in every round.

The page cache helps nobody: what a side is about to read is written back and dropped
from the cache first, outside the measured time, and every file that a side writes is on
the disk (`fsync`) before its time ends. Conversion also compares the checkpoint's
checksums and makes its own; the copy has nothing of the kind to do.

The bound of memory is two files and one layer, over what the process has once it has
imported its libraries. A ratio is the median over rounds of the ratio within a round.
"""

import itertools
import pathlib
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

from experiments.benchmarks.report import ROOT, Figure, Report
from experiments.benchmarks.workers import Seat, Turn, Worker, take_turns
from jmoe.train.runtime import keep_freed_memory

Turns = Mapping[str, Sequence[Turn]]

SHARD_BYTES = 512 << 20
MODEL = "small"
CHANGES = ("num_layers=6", "moe.router.num_experts=48", "dtype=float32")
SIDES = ("export", "import", "copy", "direct_copy")

_SPACE = 16 << 30  # bytes of disk that all directories take together
_CONVERSIONS = "experiments.benchmarks.conversions"


def run(rounds: int, say: Callable[[str], None]) -> Report:
    """Measures everything; `say` is told what comes next.

    Raises:
      ValueError: the disk has too little room.
    """
    parent = ROOT / "runs"
    parent.mkdir(exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < _SPACE:
        raise ValueError(
            f"suite='convert' needs {_SPACE >> 30} GiB in {parent}, which has "
            f"{free >> 30} GiB free."
        )
    with tempfile.TemporaryDirectory(prefix="convert_", dir=parent) as directory:
        return _measure(pathlib.Path(directory), rounds, say)


def _measure(
    directory: pathlib.Path, rounds: int, say: Callable[[str], None]
) -> Report:
    say("a checkpoint of random weights")
    with _worker("make", directory) as maker:
        made = maker.run("make").result
    say("exports, imports and copies, in turn")
    with (
        _worker("exporting", directory) as exporter,
        _worker("importing", directory) as importer,
        _worker("copying", directory) as copier,
    ):
        exporter.run("export")  # there must be something to import and to copy
        seats = {
            "export": Seat(exporter, "export"),
            "copy": Seat(copier, "copy"),
            "import": Seat(importer, "import"),
            "direct_copy": Seat(copier, "direct_copy"),
        }
        turns = take_turns(seats, rounds)
    say("other formats")
    with _worker("exporting", directory) as exporter:
        formats = ("bfloat16", "fp8")
        others = take_turns({f: Seat(exporter, f) for f in formats}, 1)
    return Report(
        suite="convert",
        compared=("orbax-checkpoint", "tensorstore"),
        settings={
            "model": [MODEL, *CHANGES],
            "rounds": rounds,
            "shard_bytes": SHARD_BYTES,
            **made,
        },
        figures=[
            *rate_figures(turns),
            *format_figures(others, made["checkpoint_bytes"]),
            *memory_figures(turns, made["layer_bytes"]),
        ],
        samples={side: [turn.result for turn in turns[side]] for side in SIDES},
    )


def _worker(side: str, directory: pathlib.Path) -> Worker:
    return Worker(
        f"{_CONVERSIONS}.{side}", setup=keep_freed_memory, directory=directory
    )


def rate_figures(turns: Turns) -> Iterator[Figure]:
    """Bytes a second of each side, and of conversions over the copy."""
    definitions = {
        "export": "checkpoint to safetensors, float32; bytes written",
        "import": "safetensors to checkpoint, float32; bytes of the files read",
        "copy": "the exported files, by shutil.copyfile",
        "direct_copy": "the same, 16 MiB at a time past the page cache",
    }
    rates = {
        side: [turn.result["bytes"] / turn.result["seconds"] for turn in turns[side]]
        for side in SIDES
    }
    for side, definition in definitions.items():
        yield Figure(
            name=side,
            value=statistics.median(rates[side]) / 1e9,
            unit="GB/s",
            definition=definition,
        )
    for side, copy in itertools.product(("export", "import"), ("copy", "direct_copy")):
        pairs = zip(rates[side], rates[copy], strict=True)
        yield Figure(
            name=f"{side} / {copy}",
            value=statistics.median(ours / theirs for ours, theirs in pairs),
            unit="×",
            definition=f"rate of the {side} over that of the {copy}",
            at_least=0.7 if copy == "copy" else None,
        )


def format_figures(turns: Turns, checkpoint_bytes: int) -> Iterator[Figure]:
    """Exports that convert the numbers too."""
    for name, (turn,) in turns.items():
        yield Figure(
            name=f"export as {name}",
            value=checkpoint_bytes / turn.result["seconds"] / 1e9,
            unit="GB/s",
            definition="bytes of the float32 checkpoint read",
        )


def memory_figures(turns: Turns, layer_bytes: int) -> Iterator[Figure]:
    """What conversions add to their processes at most."""
    bound = (2 * SHARD_BYTES + layer_bytes) / 2**30
    for side in ("export", "import"):
        last = turns[side][-1]
        yield Figure(
            name=f"peak memory, {side}",
            value=(last.peak_bytes - last.result["idle_bytes"]) / 2**30,
            unit="GiB",
            definition="ru_maxrss after the last round, less the idle process; the "
            "bound is two files and one layer",
            at_most=bound,
        )
        yield Figure(
            name=f"idle process, {side}",
            value=last.result["idle_bytes"] / 2**30,
            unit="GiB",
            definition="resident memory once its libraries are imported",
        )
