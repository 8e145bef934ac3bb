"""What evaluations show in the terminal."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import rich.console
import rich.progress
import rich.table

from jmoe.data import progress


def show_perplexities(found: Mapping[str, Any]) -> None:
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


def show_ranges(ranges: Mapping[str, Any]) -> None:
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


def show_math500(score: Any, num_samples: int, path: pathlib.Path) -> None:
    """Prints the accuracy in all, by level and by subject, and what went wrong."""
    table = rich.table.Table()
    for column in ("", "accuracy", "95% interval", "problems"):
        table.add_column(column, justify="right" if table.columns else "left")
    table.add_row("all", *_accuracy(score.total), end_section=True)
    for level, row in score.by_level.items():
        table.add_row(f"level {level}", *_accuracy(row))
    table.add_section()
    for subject, row in score.by_subject.items():
        table.add_row(subject, *_accuracy(row))
    out = rich.console.Console(highlight=False)
    out.print(table)
    if num_samples > 1:
        out.print(f"pass@{num_samples}: {score.pass_at_k:.1%}")
    wrong = {
        "without an answer in a box": score.without_answer,
        "ended by their length": score.unfinished,
        "not judged in time": score.not_judged,
        f"refused ({score.error})": score.errors,
    }
    told = [f"{number:,} {what}" for what, number in wrong.items() if number]
    of = f"{score.samples:,} answers" + (f", {', '.join(told)}" if told else "")
    out.print(f"{of}: {path}", soft_wrap=True, markup=False)


def show_speeds(found: Mapping[tuple[int, int], Any]) -> None:
    """Prints a row for each number of drafts and of requests at a time."""
    first = next(iter(found.values()))
    caption = f"{first.requests:,} prompts; how long tokens are waited for: median, p99"
    table = rich.table.Table(caption=caption)
    columns = ("drafts", "at a time", "tokens/s", "first, ms", "next, ms")
    for column in (*columns, "accepted", "a step"):
        table.add_column(column, justify="right", no_wrap=True)
    for (drafts, count), speed in found.items():
        accepted = ", ".join(f"{share:.0%}" for share in speed.acceptance)
        table.add_row(
            str(drafts),
            str(count),
            f"{speed.tokens_per_second:,.1f}",
            f"{1e3 * speed.first.median:,.0f}, {1e3 * speed.first.p99:,.0f}",
            f"{1e3 * speed.between.median:,.1f}, {1e3 * speed.between.p99:,.1f}",
            accepted,
            f"{speed.tokens_a_step:.2f}",
        )
    rich.console.Console().print(table)


def show_harness(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a row for each metric of each task."""
    table = rich.table.Table()
    for column in ("task", "metric", "value", "standard error"):
        table.add_column(column, justify="left" if len(table.columns) < 2 else "right")
    for task, found in results.items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr"):
                continue
            if not filtered:  # how many samples there were, say
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            shown = f"{error:.4f}" if isinstance(error, float) else ""
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            table.add_row(task, name, f"{value:.4f}", shown)
        table.add_section()
    rich.console.Console().print(table)


@contextlib.contextmanager
def counting(title: str, total: int | None = None, done: int = 0) -> Iterator[Any]:
    """Yields what is told how many are done, and text for the end of a bar.

    Where nobody watches, nothing is shown.
    """
    out = rich.console.Console(stderr=True, highlight=False)
    if not out.file.isatty() or out.is_dumb_terminal:
        yield lambda *_: None
        return
    with progress.live_line(out) as bar:
        task = bar.add_task(title, total=total, completed=done, text=title)

        def tell(done: int, text: str = "", total: int | None = total) -> None:
            of = f"/{total:,}" if total is not None else ""
            bar.update(
                task, completed=done, total=total, text=f"{title} {done:,}{of} {text}"
            )

        yield tell


def _accuracy(row: Any) -> tuple[str, str, str]:
    interval = f"{row.low:.1%} to {row.high:.1%}"
    return f"{row.accuracy:.1%}", interval, f"{row.problems:,}"
