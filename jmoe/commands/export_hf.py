"""Writes a run's model as a directory that transformers and vLLM load.

python scripts/export_hf.py --workdir=runs/tiny --out=runs/tiny_hf
python scripts/export_hf.py --workdir=runs/tiny --out=runs/tiny_fp8 --dtype=fp8
python scripts/export_hf.py --workdir=runs/tiny --out=runs/tiny.pt --format=pt
python scripts/export_hf.py --workdir=runs/tiny --step=best
python scripts/export_hf.py --dry_run --model=v3

A dry run lists what would be written, and of DeepSeek-V3 in FP8 compares it with what
was published.
"""

import math
import os
import pathlib

from absl import flags

from jmoe.train import runtime

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "Directory of the run.")
_OUT = flags.DEFINE_string(
    "out", None, "What to write; must not exist. By default <workdir>_hf."
)
_STEP = flags.DEFINE_string(
    "step", None, "Of which checkpoint, or best by validation; by default the newest."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "fp8"],
    "Of the weights; by default the checkpoint's. fp8 is DeepSeek's block FP8.",
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "safetensors",
    ["safetensors", "pt"],
    "A directory with safetensors files, or a file for torch.load.",
)
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "About how large a file may be.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only list what a model would have.")
_MODEL = flags.DEFINE_string("model", "v3", "Preset of the dry run.")


def main(argv: list[str]) -> int:
    runtime.set_up(argv)
    if _DRY_RUN.value:
        dry_run(_MODEL.value, _DTYPE.value or "fp8")
        return 0
    if not 0 < _SHARD_GB.value < math.inf:
        raise ValueError(f"shard_gb={_SHARD_GB.value} must be above 0, and finite.")
    workdir = runtime.path(_WORKDIR)
    runtime.start_jax()
    if _OUT.value is None:
        suffix = ".pt" if _FORMAT.value == "pt" else "_hf"
        # Beside the run, also if that is called "." or "run/".
        out = pathlib.Path(os.path.abspath(workdir) + suffix)
    else:
        out = runtime.path(_OUT)
    export(workdir, out)
    return 0


def export(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Writes `out` as the flags say."""
    from jmoe.checkpoint.retention import parse_which
    from jmoe.export.export_run import export_run
    from jmoe.export.progress import TransferProgress
    from jmoe.export.torch_file import export_torch

    writer = {"safetensors": export_run, "pt": export_torch}[_FORMAT.value]
    with TransferProgress(f"to {out}") as progress:
        writer(
            workdir,
            out,
            step=parse_which(_STEP.value),
            dtype=_DTYPE.value,
            shard_bytes=int(_SHARD_GB.value * 1e9),
            started=progress.start,
        )


def dry_run(model: str, dtype: str) -> None:
    """Prints the plan of a preset's export."""
    import rich.console

    from jmoe.export import dry_run as dry

    made = dry.plan_preset(model, dtype)
    console = rich.console.Console(highlight=False)
    console.print(dry.table(made))
    console.print(dry.summary(made))
    if (model, dtype) == dry.PUBLISHED:
        console.print("All names, shapes and types are those of the published files.")


start = runtime.command(main)
