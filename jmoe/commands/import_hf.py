"""Makes a directory that transformers or vLLM load into a run.

python scripts/import_hf.py --model=DIRECTORY --workdir=runs/imported
python scripts/generate.py --workdir=runs/imported --prompt="def f("
python scripts/train.py --experiment=runs/imported/config.json --workdir=runs/imported

What the run is to be trained on can be said with --set, as for scripts/train.py.
"""

from absl import flags

from jmoe.train import runtime

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Directory with config.json, tokenizer.json and safetensors files.",
    required=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory to make; must not exist.", required=True
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Of the checkpoint; by default each array's as the files have it.",
)
_FP8 = flags.DEFINE_enum(
    "fp8",
    "dequantize",
    ["dequantize", "keep"],
    "What becomes of FP8 weights. Kept, they can be exported again, not trained.",
)
_SET = flags.DEFINE_multi_string(
    "set", [], "path.to.field=value, over the run's defaults; repeatable."
)


def main(argv: list[str]) -> int:
    runtime.set_up(argv)
    from jmoe.export.import_run import import_run
    from jmoe.export.progress import TransferProgress

    workdir = runtime.path(_WORKDIR)
    runtime.start_jax()
    with TransferProgress(f"to {workdir}") as progress:
        import_run(
            runtime.path(_MODEL),
            workdir,
            started=progress.start,
            assignments=_SET.value,
            dtype=_DTYPE.value,
            fp8=_FP8.value,
        )
    return 0


start = runtime.command(main)
