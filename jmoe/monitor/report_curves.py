"""Draws a run's metrics over its steps, for the report and for the README's picture.

A `draw_*` function draws into given matplotlib axes and returns whether there was
anything to draw. `inline_svg` makes one part of a page, whose colours are the page's
CSS variables, so that it follows the reader's choice of light or dark.

Shapes: N logs, K columns of a metric.
"""

import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from jmoe.data.formatting import count
from jmoe.monitor.report_page import PALETTE, escape
from jmoe.monitor.run_files import Run, Series, evenly

Draw = Callable[[Axes, Run], bool]
Line = Callable[[Axes, np.ndarray, np.ndarray, str, str], None]

COLOURS = {name: light for name, (light, _) in PALETTE.items()}
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": COLOURS["line"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
BALANCED = 0.1  # the MaxVio below which the project calls a model balanced

_MAX_POINTS = 600  # of one curve: about what a screen can show
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def style(settings: dict[Any, Any]) -> AbstractContextManager[None]:
    """Gives figures within it the report's style, with `settings` of matplotlib's."""
    return matplotlib.rc_context({**_STYLE, **settings})


def inline_svg(draw: Draw, run: Run, *, alt: str, width: float, height: float) -> str:
    """Returns an `<svg>` element of `width` x `height` inches, or "" without data.

    `alt` describes it to those who can't see it; it must be unique within a page.
    """
    # Ids within the image are hashes of their content and this salt.
    with style({"svg.hashsalt": alt}):
        figure = Figure(figsize=(width, height), facecolor="none", layout="constrained")
        if not draw(figure.add_subplot(), run):
            return ""
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=_NO_METADATA)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every image of the page
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    label = escape(alt)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def label_axes(axes: Axes, label: str) -> None:
    """Names the axes and writes their numbers the way the rest of the report does."""
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: count(step)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.margins(x=0.01)


def draw_loss(axes: Axes, run: Run) -> bool:
    """Draws training, validation and MTP loss over the corpus's unigram entropy."""
    names = ("mtp_loss", "loss", "val_loss")
    mtp, loss, val_loss = (run.series(name) for name in names)
    if loss is None and val_loss is None:
        return False
    if mtp is not None:
        for depth, value_N in enumerate(mtp.value_NK.T, start=1):
            label = f"MTP, {depth + 1} tokens ahead"
            noisy_line(axes, mtp.step_N, value_N, "violet", label)
    if loss is not None:
        noisy_line(axes, loss.step_N, loss.value_NK[:, 0], "blue", "training")
    if val_loss is not None:
        _draw_evaluations(axes, val_loss, "validation")
    entropy = run.info.get("unigram_entropy")
    if entropy is not None:
        label = f"unigram entropy {entropy:.2f}"
        axes.axhline(entropy, color=COLOURS["muted"], ls="--", lw=1.2, label=label)
    label_axes(axes, "nats per token")
    axes.legend(loc="upper right")
    return True


def draw_max_vio(axes: Axes, run: Run) -> bool:
    """Draws batch MaxVio with its spread over the layers, and the global one."""
    names = ("max_vio", "max_vio_L", "max_vio_p95", "global_max_vio")
    batch, batch_L, most, globally = (run.series(name) for name in names)
    if batch is None and globally is None:
        return False
    if batch_L is not None:
        band(axes, batch_L, "blue", "range over layers")
    if batch is not None:
        noisy_line(axes, batch.step_N, batch.value_NK[:, 0], "blue", "batch")
    if most is not None:
        value_N = most.value_NK[:, 0]
        noisy_line(axes, most.step_N, value_N, "violet", "95th percentile of layers")
    if globally is not None:
        _draw_evaluations(axes, globally, "global")
    goal = {"color": COLOURS["green"], "ls": "--", "lw": 1.2}
    axes.axhline(BALANCED, label=f"balanced ({BALANCED})", **goal)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    label_axes(axes, "MaxVio")
    axes.legend(loc="upper right")
    return True


def draw_metric(key: str, draw_line: Line) -> Draw:
    """Returns what draws the scalar metric `key`, which is never negative."""

    def draw(axes: Axes, run: Run) -> bool:
        series = run.series(key)
        if series is None:
            return False
        draw_line(axes, series.step_N, series.value_NK[:, 0], "blue", key)
        axes.update_datalim([(series.step_N[0], 0.0)])  # the scale starts at zero
        label_axes(axes, "")
        return True

    return draw


def exact_line(
    axes: Axes, step_N: np.ndarray, value_N: np.ndarray, colour: str, label: str
) -> None:
    """Draws the values as they are: what follows a schedule."""
    marker = "o" if len(step_N) == 1 else None  # a line of one point is invisible
    style = {"color": COLOURS[colour], "marker": marker, "label": label}
    axes.plot(*_thin(step_N, _finite(value_N)), **style)


def noisy_line(
    axes: Axes, step_N: np.ndarray, value_N: np.ndarray, colour: str, label: str
) -> None:
    """Draws values, faint, and their moving average: what varies between batches."""
    faint = {"color": COLOURS[colour], "alpha": 0.35, "lw": 0.8}
    axes.plot(*_thin(step_N, _finite(value_N)), **faint)
    exact_line(axes, step_N, _moving_average(value_N), colour, label)


def band(axes: Axes, series: Series, colour: str, label: str) -> None:
    """Shades what is between a metric's least and its largest column."""
    step_N, value_NK = _thin(series.step_N, _finite(series.value_NK))
    low_N, high_N = (of.reduce(value_NK, axis=1) for of in (np.fmin, np.fmax))
    shade = {"color": COLOURS[colour], "alpha": 0.18, "lw": 0, "label": label}
    axes.fill_between(step_N, low_N, high_N, **shade)


def _draw_evaluations(axes: Axes, series: Series, label: str) -> None:
    step_N, value_NK = _thin(series.step_N, _finite(series.value_NK))
    colour = COLOURS["orange"]
    axes.plot(step_N, value_NK[:, 0], "o-", color=colour, ms=3.5, label=label)


def _moving_average(value_N: np.ndarray) -> np.ndarray:
    """Returns the mean over a 40th of the run, centred, so without lag.

    NaNs count for nothing.
    """
    half = len(value_N) // 80
    kernel = np.hanning(2 * half + 3)[1:-1]  # odd, or it would shift the curve
    known_N = np.isfinite(value_N)
    total_N = np.convolve(np.where(known_N, value_N, 0.0), kernel, mode="same")
    weight_N = np.convolve(known_N, kernel, mode="same")
    return np.divide(
        total_N, weight_N, out=np.full_like(total_N, np.nan), where=weight_N > 0
    )


def _finite(value: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(value), value, np.nan)


def _thin(step_N: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most `_MAX_POINTS` evenly spaced points, with the first and last."""
    kept = evenly(len(step_N), _MAX_POINTS)
    return step_N[kept], value[kept]


def _tick(value: float) -> str:
    return count(value).replace(".0", "") if abs(value) >= 1e3 else f"{value:g}"
