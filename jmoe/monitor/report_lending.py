"""Shows how devices lent each other experts, and what became of their balance.

Curves have by how much the busiest device exceeded the mean, without lending and with
it, and what was lent. Heat maps have who lent to whom, one for each third of the run.
All is counted by `jmoe.parallel.balanced`.

Shapes: N logs, L MoE layers, P devices of the `expert` axis, as lenders and then as
borrowers.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from jmoe.monitor import report_curves
from jmoe.monitor.report_curves import COLOURS, Draw
from jmoe.monitor.run_files import Run

_WINDOWS = 3
# From nothing, which suits light and dark paper.
_COLOUR_MAP = LinearSegmentedColormap.from_list(
    "loans", [COLOURS["blue"] + "00", COLOURS["blue"] + "ff"]
)


class _Window(NamedTuple):
    """What was lent in a step, on average over the logs of some steps."""

    first_step: int
    last_step: int
    lent_PP: np.ndarray


def pictures(run: Run) -> str:
    """Returns HTML about what was lent in a run; "" if nothing was."""
    lent = run.series("experts_lent_L")
    if lent is None or not lent.value_NK.any():
        return ""
    balance = report_curves.inline_svg(
        draw_device_max_vio,
        run,
        alt="Device MaxVio with and without lending over the steps",
        width=10,
        height=3.2,
    )
    curves = (
        ("experts lent a step, of a layer", draw_counts("experts_lent_L")),
        ("rows left over a step, of a layer", draw_counts("rows_left_over_L")),
    )
    figures = "\n".join(
        f"<figure><figcaption>{name}</figcaption>"
        f"{report_curves.inline_svg(draw, run, alt=name, width=5, height=2.2)}</figure>"
        for name, draw in curves
    )
    return f"""
<p>Device MaxVio is how far the busiest device exceeds the mean number of rows: the
others wait for it that long. To even it out, devices lend experts for a microbatch.
{_in_numbers(run)} Rows left over are those by which devices still exceed the mean.</p>
{balance}
<div class="pair">
{figures}
</div>
{_heat_maps(run)}"""


def draw_device_max_vio(axes: Axes, run: Run) -> bool:
    """Draws the busiest device's excess without lending and with it, over layers."""
    for key, colour, label in (
        ("device_max_vio_L", "orange", "without lending"),
        ("device_max_vio_lent_L", "blue", "with lending"),
    ):
        series = run.series(key)
        if series is None:
            return False
        mean_N = series.value_NK.mean(1)
        report_curves.band(axes, series, colour, "range over layers")
        report_curves.noisy_line(axes, series.step_N, mean_N, colour, label)
    axes.set_ylim(bottom=0)
    report_curves.label_axes(axes, "device MaxVio")
    axes.legend(loc="upper right", ncols=2)
    return True


def draw_counts(key: str) -> Draw:
    """Returns what draws a count of each layer: their range, and its mean."""

    def draw(axes: Axes, run: Run) -> bool:
        series = run.series(key)
        if series is None:
            return False
        mean_N = series.value_NK.mean(1)
        report_curves.band(axes, series, "blue", "range over layers")
        report_curves.noisy_line(axes, series.step_N, mean_N, "blue", "mean")
        axes.set_ylim(bottom=0)
        report_curves.label_axes(axes, "")
        return True

    return draw


def draw_loans(lent_PP: np.ndarray, most: float) -> Draw:
    """Returns what draws who lent to whom; `most` has the strongest colour."""

    def draw(axes: Axes, _: Run) -> bool:
        axes.imshow(
            lent_PP, cmap=_COLOUR_MAP, vmin=0, vmax=most or 1, interpolation="none"
        )
        end = len(lent_PP) - 0.5  # nobody lends to itself
        axes.plot([-0.5, end], [-0.5, end], color=COLOURS["line"], lw=1)
        axes.spines[:].set_visible(True)
        axes.grid(False)
        axes.set_ylabel("lender")
        axes.set_xlabel("borrower")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        return True

    return draw


def _in_numbers(run: Run) -> str:
    """Returns a sentence with averages over the logs."""
    keys = "device_max_vio_L", "device_max_vio_lent_L", "experts_lent_L", "bytes_lent_L"
    found = [run.series(key) for key in keys]
    known = [series.value_NK for series in found if series is not None]
    if len(known) < len(keys):
        return ""
    before, after, lent, moved = known
    return (
        f"On average over layers and steps, that lowered it from {before.mean():.3f} "
        f"to {after.mean():.3f}, by {lent.mean():.1f} loans a layer and step. Their "
        f"weights were {moved.sum(1).mean() / 1e6:,.1f} MB a step in all layers."
    )


def _windows(run: Run) -> list[_Window]:
    """Returns parts of a run, each with as many logs as any other.

    Of a run whose mesh was changed, the part with the last number of devices is shown.
    """
    rows = [row for row in run.rows if "lent_PP" in row]
    rows = [row for row in rows if len(row["lent_PP"]) == len(rows[-1]["lent_PP"])]
    ends = np.linspace(0, len(rows), _WINDOWS + 1).astype(int)
    parts = [rows[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True) if a < b]
    return [
        _Window(
            part[0]["step"],
            part[-1]["step"],
            np.mean([row["lent_PP"] for row in part], axis=0),
        )
        for part in parts
    ]


def _heat_maps(run: Run) -> str:
    windows = _windows(run)
    if not windows:
        return ""
    most = max(float(window.lent_PP.max()) for window in windows)
    tiles = "".join(_tile(run, window, most) for window in windows)
    return f"""
<p>Who lent to whom, and how many experts of all layers in a step:</p>
<div class="scale"><span>none</span><span class="bar"
style="background: linear-gradient(to right, transparent, {COLOURS["blue"]})"></span>
<span>{most:.3g} experts</span></div>
<div class="tiles thirds">{tiles}</div>"""


def _tile(run: Run, window: _Window, most: float) -> str:
    first, last, lent_PP = window
    steps = f"Step {first:,} to {last:,}" if first < last else f"Step {first:,}"
    alt = f"{steps}: who lent to whom"
    draw = draw_loans(lent_PP, most)
    svg = report_curves.inline_svg(draw, run, alt=alt, width=3.3, height=3.1)
    return f"""
<figure class="tile">
<figcaption><b>{steps}</b> {_busiest(lent_PP)}</figcaption>
{svg}
</figure>"""


def _busiest(lent_PP: np.ndarray) -> str:
    """Returns who lends the most and who borrows the most, and their shares of all."""
    total = lent_PP.sum()
    if not total:
        return "nothing was lent"
    said = []
    for verb, lent_P in (("lends", lent_PP.sum(1)), ("borrows", lent_PP.sum(0))):
        device = int(lent_P.argmax())
        said.append(f"device {device} {verb} {lent_P[device] / total:.0%}")
    return ", ".join(said)
