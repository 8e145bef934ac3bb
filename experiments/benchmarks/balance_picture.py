"""Draws what balance.json has of the busiest device, and of losses against GShard's."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.benchmarks import balance_busiest
from experiments.benchmarks.balance_runs import OURS, SERVED

_WAYS = {"static": "C3", "placement": "C1", "lending": "C2", "both": "C0"}
_RUNS = ("C0", "C3", "C1")


def draw(parts: Mapping[str, Any], path: pathlib.Path) -> bool:
    """Draws the picture if both parts were measured; returns whether they were."""
    if not parts.keys() >= {"busiest", "gshard"}:
        return False
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    training, serving, losses = figure.subplots(1, 3)
    traces = parts["busiest"]["samples"]
    draw_busiest(training, traces["training"], "busiest of 16 devices, training")
    draw_busiest(serving, traces[SERVED[0]], f"the same, serving {SERVED[0]}")
    serving.set_ylabel("")
    serving.legend(frameon=False)
    draw_losses(losses, parts["gshard"]["samples"]["validation"])
    for axes in (training, serving, losses):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    return True


def draw_busiest(axes: Axes, ways: Mapping[str, Any], title: str) -> None:
    """Draws the busiest device's rows over the mean, a line for each way."""
    for way, colour in _WAYS.items():
        busiest_B = ways[way]["busiest"]
        step_B = balance_busiest.BLOCK * (np.arange(len(busiest_B)) + 0.5)
        style = "--" if way == "both" else "-"
        axes.plot(step_B, busiest_B, color=colour, label=way, linestyle=style)
    axes.set(title=title, xlabel="step", ylabel="rows over the mean")
    axes.set_ylim(bottom=0.95)


def draw_losses(axes: Axes, runs: Mapping[str, Any]) -> None:
    """Draws validation losses over operations: the mean of seeds, and their range.

    The first third falls so far that nothing would be seen of the rest.
    """
    for (name, run), colour in zip(runs.items(), _RUNS, strict=True):
        shown = slice(len(run["tokens"]) // 3, None)
        loss_SV = np.array(run["losses"])[:, shown]
        done_V = np.array(run["tokens"])[shown] * run["gflop_a_token"] / 1e3
        style = {"color": colour, "zorder": 3 if name == OURS else 2}
        axes.plot(done_V, loss_SV.mean(0), marker=".", label=name, **style)
        axes.fill_between(
            done_V, loss_SV.min(0), loss_SV.max(0), color=colour, alpha=0.2, lw=0
        )
    axes.set(title="validation loss over operations", xlabel="TFLOP")
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False)
