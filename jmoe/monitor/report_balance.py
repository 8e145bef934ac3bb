"""Shows a run's expert load and selection bias over time, one tile a MoE layer.

A tile is a heat map above the paths of the bias, on the same time axis. In the heat map
a row is an expert and a column a log, one pixel each, in a PNG with a palette: that
keeps 60 layers of 256 experts below a megabyte.

Shapes: N logs, L MoE layers, E routed experts, C colour channels.
"""

import base64
import io

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from jmoe.monitor.report_curves import Draw, label_axes
from jmoe.monitor.run_files import Balance, Run, evenly

_COLOUR_MAP = "RdBu_r"  # blue: idle, white: the fair share, red: overloaded
_MAX_LOAD = 2.0  # where the colours end, as far above the fair share as 0 is below

_NUM_COLOURS = 33  # odd, so that the fair share has a colour of its own
_UNKNOWN_RGB = (128, 128, 128)
_MAX_PATHS = 16  # in a tile
_MAX_POINTS = 60_000  # of all paths in all tiles
_PATHS_HEIGHT = 200


def tiles(run: Run) -> str:
    """Returns HTML of all layers' tiles and their scale; "" if nothing was recorded."""
    if run.balance is None:
        return ""
    step_N, load_NLE, bias_NLE = run.balance
    num_layers, num_experts = load_NLE.shape[1:]
    # A choice depends on how biases differ; what they share may drift.
    bias_NLE = bias_NLE - bias_NLE.mean(axis=-1, keepdims=True)
    limit = float(np.fmax.reduce(np.abs(bias_NLE), axis=None))
    centred = Balance(step_N, load_NLE, bias_NLE)
    tiles = (_tile(run, centred, layer, limit) for layer in range(num_layers))
    return f"""
<p>A row of pixels is one of {num_experts} experts, a column one of {len(step_N)} logs,
from step {step_N[0]:,} to {step_N[-1]:,}. Below are the selection biases of
{min(num_experts, _MAX_PATHS)} experts, less their layer's mean, on a scale from
&minus;{limit:.2g} to {limit:.2g}: experts that end <b class="raised">raised</b> are
chosen more often than their scores ask for, those that end
<b class="lowered">lowered</b> less often.</p>
{_colour_bar()}
<div class="tiles">{"".join(tiles)}</div>"""


def load_png(load_NE: np.ndarray) -> bytes:
    """Returns a heat map of loads in units of the fair share, E pixels high, N wide."""
    scaled_EN = np.clip(load_NE.T / _MAX_LOAD, 0, 1) * (_NUM_COLOURS - 1)
    index_EN = np.where(np.isnan(scaled_EN), _NUM_COLOURS, scaled_EN.round())
    image = Image.fromarray(index_EN.astype(np.uint8))
    image.putpalette([*_palette().ravel().tolist(), *_UNKNOWN_RGB])
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return file.getvalue()


def draw_load(layer: int) -> Draw:
    """Returns what draws the heat map of one MoE layer with axes and a scale.

    It raises ValueError if the run has no such layer.
    """

    def draw(axes: Axes, run: Run) -> bool:
        if run.balance is None:
            return False
        step_N, load_NLE, _ = run.balance
        num_layers, num_experts = load_NLE.shape[1:]
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer={layer} must be from 0 to {num_layers - 1}.")
        steps = step_N[0], max(step_N[-1], step_N[0] + 1)
        image = axes.imshow(
            load_NLE[:, layer].T,
            aspect="auto",
            cmap=_COLOUR_MAP,
            vmin=0,
            vmax=_MAX_LOAD,
            interpolation="nearest",
            extent=(*steps, num_experts - 0.5, -0.5),
        )
        bar = axes.figure.colorbar(image, ax=axes, extend="max", aspect=30)
        bar.outline.set_visible(False)
        bar.set_ticks([0, 0.5, 1, 1.5, 2])
        bar.set_label("times the fair share")
        axes.grid(False)
        label_axes(axes, "expert")
        return True

    return draw


def _palette() -> np.ndarray:
    """Returns the colours from load 0 to `_MAX_LOAD`, uint8 [_NUM_COLOURS, C]."""
    colour_map = matplotlib.colormaps[_COLOUR_MAP]
    return colour_map(np.linspace(0, 1, _NUM_COLOURS), bytes=True)[:, :3]


def _tile(run: Run, balance: Balance, layer: int, limit: float) -> str:
    load_NE = balance.load_NLE[:, layer]
    png = base64.b64encode(load_png(load_NE)).decode()
    alt = (
        f"Load of the experts of MoE layer {layer}; in the end from "
        f"{load_NE[-1].min():.2f} to {load_NE[-1].max():.2f} times the fair share"
    )
    return f"""
<figure class="tile">
<figcaption><b>MoE layer {layer}</b> {_caption(run, layer)}</figcaption>
<img alt="{alt}" src="data:image/png;base64,{png}">
{_bias_paths(balance.bias_NLE[:, layer], layer, limit, balance.load_NLE.shape[1])}
</figure>"""


def _caption(run: Run, layer: int) -> str:
    """Returns what the layer's last logs say, as far as it is worth a word."""
    words = []
    for key, name in (("global_max_vio_L", "global"), ("max_vio_L", "batch")):
        max_vio_L = run.last(key)
        if max_vio_L is not None:
            words.append(f"{name} MaxVio {max_vio_L[layer]:.2f}")
            break
    dead_L, drop_L = run.last("dead_experts_L"), run.last("drop_rate_L")
    if dead_L is not None and dead_L[layer] > 0:
        words.append(f"{dead_L[layer]:.0f} dead")
    if drop_L is not None and drop_L[layer] > 0:
        words.append(f"{drop_L[layer]:.1%} dropped")
    return ", ".join(words)


def _bias_paths(bias_NE: np.ndarray, layer: int, limit: float, num_layers: int) -> str:
    """Returns an SVG as wide as the heat map above it.

    Experts are spread over all biases.
    """
    num_logs, num_experts = bias_NE.shape
    num_paths = min(num_experts, _MAX_PATHS)
    times = evenly(num_logs, _MAX_POINTS // (num_layers * num_paths))
    lines = []
    for expert in np.argsort(bias_NE[-1])[evenly(num_experts, num_paths)]:
        height_N = (1 - bias_NE[times, expert] / (limit or 1)) * _PATHS_HEIGHT / 2
        points = " ".join(
            f"{time},{height:.0f}"
            for time, height in zip(times, height_N, strict=True)
            if np.isfinite(height)
        )
        side = "raised" if bias_NE[-1, expert] > 0 else "lowered"
        lines.append(f'<polyline class="{side}" points="{points}"/>')
    middle = _PATHS_HEIGHT // 2
    width = max(1, num_logs - 1)
    return f"""<svg class="paths" role="img" aria-label="Bias in MoE layer {layer}"
viewBox="0 0 {width} {_PATHS_HEIGHT}" preserveAspectRatio="none">
<polyline class="zero" points="0,{middle} {width},{middle}"/>{"".join(lines)}</svg>"""


def _colour_bar() -> str:
    stops = ", ".join(
        "rgb({}, {}, {})".format(*rgb) for rgb in _palette()[::4].tolist()
    )
    return f"""
<div class="scale"><span>idle</span>
<span class="bar" style="background: linear-gradient(to right, {stops})"></span>
<span>{_MAX_LOAD:g} times the fair share, or more</span></div>"""
