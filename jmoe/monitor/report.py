"""Makes `report.html`, one self-contained page about a run, from the run's files.

Whatever a run didn't record reads "not recorded": a run that was killed, has logged
once, or wrote only some of its files has a report all the same.

Shapes: N logs, K columns of a metric.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from jmoe.data import durable
from jmoe.data.formatting import count, duration
from jmoe.monitor import (
    report_balance,
    report_curves,
    report_lending,
    report_page,
    run_files,
)
from jmoe.monitor.report_curves import draw_metric, exact_line, noisy_line
from jmoe.monitor.report_page import escape
from jmoe.monitor.run_files import Run, evenly

_MAX_SAMPLES = 4  # shown of the last step that has any
_MAX_EARLIER = 6  # earlier steps whose first sample is shown

_SMALL_CURVES = (
    ("learning rate", draw_metric("learning_rate", exact_line)),
    ("rate of the bias update", draw_metric("bias_rate", exact_line)),
    ("tokens per second", draw_metric("tokens_per_second", noisy_line)),
    ("gradient norm, before clipping", draw_metric("grad_norm", noisy_line)),
)


def write_report(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into a run directory and returns its path.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    run = run_files.read_run(run_dir)
    name = run.config.get("name", run.directory.resolve().name)
    sections = (
        ("Loss", _loss(run)),
        ("Balance", _balance(run)),
        *_lending(run),
        ("Load and bias of each expert", report_balance.tiles(run)),
        ("Training", _training(run)),
        ("Generated text", _samples(run)),
        ("How it was run", _origin(run)),
        ("Configuration", _configuration(run)),
    )
    parts = [_header(name, run)]
    parts += [report_page.section(title, content) for title, content in sections]
    path = run.directory / run_files.REPORT
    durable.write_text(path, report_page.page(f"jmoe: {name}", parts))
    return path


def write_picture(
    run_dir: str | pathlib.Path, path: str | pathlib.Path, *, layer: int = 0
) -> pathlib.Path:
    """Draws loss, MaxVio and the load of one MoE layer side by side, 1600 pixels wide.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: the run has no such layer.
    """
    run = run_files.read_run(run_dir)
    large = {"font.size": 9, "axes.titlesize": 11, "figure.dpi": 160}
    with report_curves.style(large):
        figure = Figure(figsize=(10, 3.4), facecolor="white", layout="constrained")
        panels = (
            ("Loss", report_curves.draw_loss),
            ("Balance", report_curves.draw_max_vio),
            ("Load of each expert", report_balance.draw_load(layer)),
        )
        for axes, (title, draw) in zip(figure.subplots(1, 3), panels, strict=True):
            if not draw(axes, run):
                axes.set_axis_off()
                axes.text(0.5, 0.5, "not recorded", ha="center")
            axes.set_title(title)
        figure.savefig(path, format="png")
    return pathlib.Path(path)


def _header(name: str, run: Run) -> str:
    said = [run.info.get("started"), run.info.get("device"), run.directory]
    line = " &middot; ".join(escape(item) for item in said if item)
    numbers = report_page.numbers(_summary(run))
    return f"<header>\n<h1>{escape(name)}</h1>\n<p>{line}</p>\n{numbers}</header>\n"


def _summary(run: Run) -> Iterator[tuple[str, str | None, str]]:
    def last(key: str, form: str) -> str | None:
        value_K = run.last(key)
        return None if value_K is None else format(value_K[0], form)

    entropy = run.info.get("unigram_entropy")
    compared = f"unigram entropy {entropy:.3f}" if entropy is not None else ""
    yield "validation loss", last("val_loss", ".4f"), compared
    yield "validation perplexity", last("val_perplexity", ".2f"), ""
    yield "training loss", last("loss", ".4f"), "at the last log"
    goal = f"balanced below {report_curves.BALANCED}"
    yield "global MaxVio", last("global_max_vio", ".3f"), goal
    tokens = run.last("tokens")
    step = f"in {run.rows[-1]['step']:,} steps" if run.rows else ""
    yield "tokens", None if tokens is None else count(tokens[0]), step
    yield "tokens per second", _median_speed(run), "median"
    yield "training time", _training_time(run), "without evaluations"
    size, active = run.info.get("parameters"), run.info.get("active_parameters")
    used = "" if active is None else f"{count(active)} active per token"
    yield "parameters", None if size is None else count(size), used


def _median_speed(run: Run) -> str | None:
    speed = run.series("tokens_per_second")
    return None if speed is None else count(float(np.median(speed.value_NK)))


def _training_time(run: Run) -> str | None:
    """Returns steps times their time, so that pauses between processes don't count."""
    seconds = run.series("step_seconds")
    if seconds is None:
        return None
    steps_N = np.diff(seconds.step_N, prepend=0)
    return duration(float(np.sum(steps_N * seconds.value_NK[:, 0])))


def _loss(run: Run) -> str:
    alt = "Training, validation and MTP loss over the steps"
    curve = report_curves.inline_svg(
        report_curves.draw_loss, run, alt=alt, width=10, height=3.6
    )
    loss = run.series("loss")
    broken = [] if loss is None else loss.step_N[~np.isfinite(loss.value_NK[:, 0])]
    if len(broken):
        curve += f'<p class="warning">First not finite at step {broken[0]:,}.</p>'
    return curve


def _balance(run: Run) -> str:
    alt = "MaxVio of training batches and of the validation set over the steps"
    curve = report_curves.inline_svg(
        report_curves.draw_max_vio, run, alt=alt, width=10, height=3.6
    )
    if not curve:
        return ""
    return f"""
<p>MaxVio is how far the busiest expert of a layer exceeds its fair share: 0 is perfect,
1 is twice the share. Batch MaxVio counts the tokens of one training step; the global
one those of the whole validation set, where chance plays little part.</p>
{_over_layers(run)}{curve}"""


def _over_layers(run: Run) -> str:
    names = [f"global_max_vio_{suffix}" for suffix in ("p50", "p95", "max")]
    found = [value_K[0] for name in names if (value_K := run.last(name)) is not None]
    if len(found) < len(names):
        return ""
    middle, most, worst = found
    return f"""
<p>Over the layers, at the last evaluation, the median of global MaxVio is {middle:.3f},
the 95th percentile {most:.3f} and the largest {worst:.3f}.</p>"""


def _lending(run: Run) -> list[tuple[str, str]]:
    """Returns no section of a run that lent nothing: most don't."""
    content = report_lending.pictures(run)
    return [("Lending of experts", content)] if content else []


def _training(run: Run) -> str:
    figures = []
    for name, draw in _SMALL_CURVES:
        svg = report_curves.inline_svg(draw, run, alt=name, width=5, height=2.2)
        content = svg or report_page.MISSING
        figures.append(f"<figure><figcaption>{name}</figcaption>{content}</figure>\n")
    return f'<div class="pair">\n{"".join(figures)}</div>'


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    by_step: dict[int, list[str]] = {}
    for sample in run.samples:
        prompt, text = escape(sample.get("prompt", "")), escape(sample.get("text", ""))
        block = f"<pre><b>{prompt}</b>{text}</pre>"
        by_step.setdefault(sample["step"], []).append(block)
    *earlier, last = sorted(by_step)
    shown = "\n".join(by_step[last][:_MAX_SAMPLES])
    html = f"<p>At step {last:,}; the prompt is in bold.</p>\n{shown}"
    if earlier:
        steps = [earlier[at] for at in evenly(len(earlier), _MAX_EARLIER)]
        blocks = "\n".join(f"<p>Step {s:,}</p>\n{by_step[s][0]}" for s in steps)
        html += f"\n<details><summary>Earlier</summary>\n{blocks}\n</details>"
    return html


def _origin(run: Run) -> str:
    command, versions = run.info.get("command"), run.info.get("versions")
    shown = f"<pre>{escape(command)}</pre>" if command else report_page.MISSING
    if versions:
        table = report_page.pairs((name, str(versions[name])) for name in versions)
        shown += f"\n<details><summary>Versions</summary>\n{table}</details>"
    return shown


def _configuration(run: Run) -> str:
    if not run.config:
        return ""
    text = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    return f"<details><summary>config.json</summary>\n<pre>{text}</pre>\n</details>"
