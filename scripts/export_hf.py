"""Writes a run's model as a directory that transformers and vLLM load.

python scripts/export_hf.py --workdir=runs/tiny --out=runs/tiny_hf
python scripts/export_hf.py --workdir=runs/tiny --out=runs/tiny_fp8 --dtype=fp8
"""

import pathlib
import sys

from absl import app, flags

from jmoe.train import runtime

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "Directory of the run.")
_OUT = flags.DEFINE_string(
    "out", None, "Directory to write; must not exist.", required=True
)
_STEP = flags.DEFINE_integer(
    "step", None, "Of which checkpoint; by default the newest."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "fp8"],
    "Of the weights; by default the checkpoint's. fp8 is DeepSeek's block FP8.",
)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    runtime.keep_freed_memory()
    runtime.log_warnings_only()
    from jmoe.export.export_run import export_run
    from jmoe.export.progress import Progress

    try:
        with Progress(f"to {_OUT.value}") as progress:
            export_run(
                pathlib.Path(_WORKDIR.value),
                pathlib.Path(_OUT.value),
                step=_STEP.value,
                dtype=_DTYPE.value,
                started=progress.start,
            )
    except (ValueError, OSError) as error:
        return runtime.report_mistake(error)
    return 0


if __name__ == "__main__":
    sys.exit(app.run(main))
