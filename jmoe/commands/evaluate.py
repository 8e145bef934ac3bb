"""Evaluates a run's model on held-out text, with its weights in several forms.

python scripts/evaluate.py --workdir=runs/tiny
python scripts/evaluate.py --weights=native --weights=int4-experts
python scripts/evaluate.py --set train.eval_batches=256 --step=best
python scripts/evaluate.py --set precision=fp8

Of a run in FP8 it also shows, tensor by tensor, how much is lost to e4m3's range.
"""

import rich.console
import rich.table
from absl import flags

from jmoe.data import cache
from jmoe.train import runtime

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "Directory of the run.")
_STEP = flags.DEFINE_string(
    "step", None, "Of which checkpoint, or best by validation; by default the newest."
)
_WEIGHTS = flags.DEFINE_multi_string(
    "weights", None, "native, fp8 or int4-experts; repeatable. By default all."
)
_SET = flags.DEFINE_multi_string("set", [], "path.to.field=value; repeatable.")


def main(argv: list[str]) -> int:
    runtime.set_up(argv)
    from jmoe.checkpoint.retention import parse_which
    from jmoe.evals.fp8_ranges import fp8_ranges
    from jmoe.evals.perplexity import perplexity
    from jmoe.nn.quantized import FORMS
    from jmoe.ops.fp8 import RECIPES
    from jmoe.train.trained import load_trained, reconfigured

    runtime.start_jax()
    trained = load_trained(runtime.path(_WORKDIR), step=parse_which(_STEP.value))
    trained = reconfigured(trained, _SET.value)
    runtime.keep_compiled(cache.directory(trained.run.data) / runtime.COMPILED)
    found = {form: perplexity(trained, form) for form in _WEIGHTS.value or list(FORMS)}
    ranges = fp8_ranges(trained) if trained.run.precision in RECIPES else None
    show(found)
    if ranges is not None:
        show_ranges(ranges)
    return 0


def show(found: dict) -> None:
    """Prints a row for each form; perplexities beside the first one's."""
    first = next(iter(found.values()))
    table = rich.table.Table(caption=f"{first.tokens:,} tokens of held-out text")
    for column in ("weights", "MB", "loss", "perplexity", "against the first"):
        table.add_column(column, justify="right" if table.columns else "left")
    for form, row in found.items():
        table.add_row(
            form,
            f"{row.weight_bytes / 1e6:,.2f}",
            f"{row.loss:.4f}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity / first.perplexity - 1:+.3%}",
        )
    rich.console.Console().print(table)


def show_ranges(ranges: dict) -> None:
    """Prints a row for each tensor of each module."""
    caption = "flushed: of the numbers other than 0; saturated: that become 448"
    table = rich.table.Table(caption=caption)
    for column in ("module", "tensor", "flushed", "saturated"):
        table.add_column(column, justify="left" if len(table.columns) < 2 else "right")
    for module, tensors in ranges.items():
        for i, (tensor, row) in enumerate(tensors.items()):
            fractions = f"{row.flushed:.3%}", f"{row.saturated:.3%}"
            table.add_row("" if i else module, tensor, *fractions)
        table.add_section()
    rich.console.Console().print(table)


start = runtime.command(main)
