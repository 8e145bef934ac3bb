"""Timelines of pipeline schedules as a picture: a row a rank, on one scale of time.

Lengths are in inches, with y from the top.
"""

import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from jmoe.parallel.schedule import Span, Timeline
from jmoe.plan.timeline import (
    LATER,
    TaskPart,
    activations,
    has_later,
    kinds,
    number,
    parts,
)

FORMATS = (".svg", ".png")

_SHORTEST = 0.15  # how wide the shortest task should be
_WIDTHS = 10.0, 30.0  # of the drawing; then the shortest becomes as long as it may
_ROW, _GAP = 0.31, 0.04  # a rank's row, and what of it stays free
_LEFT, _RIGHT, _TITLE, _BETWEEN, _TOP, _BOTTOM = 0.6, 0.25, 0.3, 0.2, 0.4, 0.55
_INK, _MUTED, _IDLE = "#1a202c", "#5a6473", "#eef0f3"
_LARGEST_FONT = 7.5
_DIGIT = 0.66  # width of a digit, by the size of the font
_SWATCH, _LINE = 0.3, 0.24  # of the key
_FRAME: dict[str, Any] = {
    "facecolor": "none",
    "edgecolor": _INK,
    "lw": 0.8,
    "zorder": 3,
}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "timeline",
    "text.color": _INK,
    "ytick.major.size": 0,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


def draw(timelines: Sequence[Timeline], path: str | pathlib.Path) -> pathlib.Path:
    """Writes timelines, one above the other, to an SVG or PNG file.

    Raises:
      ValueError: the file's name says that it is neither.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"out={str(path)!r} must end in {' or '.join(FORMATS)}.")
    longest = float(max(t.makespan for t in timelines))
    shortest = float(min(filter(None, _durations(timelines))))
    inner = min(max(longest / shortest * _SHORTEST, _WIDTHS[0]), _WIDTHS[1])
    heights = [t.schedule.num_ranks * _ROW for t in timelines]
    key = _place_key(timelines, inner)
    lines = 1 + key[-1][3]
    top = _TOP + lines * _LINE
    panels = sum(heights) + len(heights) * (_TITLE + _BETWEEN) - _BETWEEN
    width, height = _LEFT + inner + _RIGHT, top + panels + _BOTTOM
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), facecolor="white")

        def place(top: float, tall: float) -> Axes:
            """Returns axes over the whole width of the drawing."""
            return figure.add_axes(
                (
                    _LEFT / width,
                    1 - (top + tall) / height,
                    inner / width,
                    tall / height,
                )
            )

        axes = place(_TOP / 2, lines * _LINE)
        axes.set(xlim=(0, inner), ylim=(lines, 0))
        _draw_key(axes, key)
        for timeline, tall in zip(timelines, heights, strict=True):
            axes = place(top + _TITLE, tall)
            axes.set_xlim(0, longest)
            _draw_timeline(axes, timeline, inner / longest)
            top += _TITLE + tall + _BETWEEN
        axes.tick_params(axis="x", labelbottom=True, bottom=True)
        axes.set_xlabel("time, in the costs' unit", color=_MUTED)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)
    return path


def _durations(timelines: Sequence[Timeline]) -> Iterator[Any]:
    for timeline in timelines:
        for spans in timeline.spans:
            yield from (span.end - span.start for span in spans)


def _draw_timeline(axes: Axes, timeline: Timeline, inches: float) -> None:
    """Draws one timeline.

    Args:
      inches: of a unit of time.
    """
    schedule = timeline.schedule
    ranks = schedule.num_ranks
    axes.set_ylim(ranks, 0)
    axes.set_yticks([rank + 0.5 for rank in range(ranks)], map(str, range(ranks)))
    axes.set_ylabel("rank", color=_MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="x", labelbottom=False, bottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(schedule.name, loc="left", fontweight="bold", fontsize=11)
    said = (
        f"makespan {number(timeline.makespan)}   bubble {number(timeline.bubble)}   "
        f"peak activations {number(activations(timeline))}   "
        f"parameters {timeline.parameters}x"
    )
    axes.set_title(said, loc="right", fontsize=9, color=_MUTED)
    for rank, spans in enumerate(timeline.spans):
        axes.add_patch(
            Rectangle(
                (0, rank + _GAP / _ROW / 2),
                float(timeline.makespan),
                1 - _GAP / _ROW,
                facecolor=_IDLE,
                linewidth=0,
            )
        )
        for span in spans:
            if span.end > span.start:
                _draw_task(axes, span, parts(schedule, rank, span.task), rank, inches)


def _draw_task(
    axes: Axes, span: Span, found: list[TaskPart], rank: int, inches: float
) -> None:
    """Draws a box, or two in a frame, one above the other, for what is overlapped."""
    start, length = float(span.start), float(span.end - span.start)
    y, tall = rank + _GAP / _ROW / 2, (1 - _GAP / _ROW) / len(found)
    for i, part in enumerate(found):
        corner = (start, y + i * tall)
        axes.add_patch(
            Rectangle(
                corner,
                length,
                tall,
                facecolor=part.colour,
                edgecolor="white",
                linewidth=0.6,
            )
        )
        _write(axes, part, corner, length * inches, length, tall)
    if len(found) == 2:
        axes.add_patch(Rectangle((start, y), length, 2 * tall, **_FRAME))


def _write(
    axes: Axes,
    part: TaskPart,
    corner: tuple[float, float],
    inches: float,
    length: float,
    tall: float,
) -> None:
    """Writes the microbatch, as large as fits, or not where nobody could read it."""
    label = str(part.microbatch)
    fits = 72 * 0.8 * inches / (_DIGIT * len(label)), 72 * 0.85 * tall * _ROW
    size = min(_LARGEST_FONT, *fits)
    if size >= 3.5:
        axes.text(
            corner[0] + length / 2,
            corner[1] + tall / 2,
            label,
            fontsize=size,
            color=part.ink,
            ha="center",
            va="center_baseline",
        )


def _place_key(
    timelines: Sequence[Timeline], inches: float
) -> list[tuple[str, str, float, int]]:
    """Returns each entry's kind, text, place from the left and line."""
    entries = [*kinds(timelines).items()]
    if has_later(timelines):
        entries.append(("", f"dark: {LATER}"))
    placed, left, line = [], 0.0, 0
    for kind, said in entries:
        wide = _SWATCH * 1.3 + TextPath((0, 0), said, size=9).get_extents().width / 72
        if left and left + wide > inches:
            left, line = 0.0, line + 1
        placed.append((kind, said, left, line))
        left += wide + 0.3
    return placed


def _draw_key(axes: Axes, key: list[tuple[str, str, float, int]]) -> None:
    """Draws what colours mean; the axes' units are inches across and lines down."""
    axes.set_axis_off()
    for kind, said, left, line in key:
        halves = [
            TaskPart(name, 0, Fraction(0)).colour for name in kind.split("&") if name
        ]
        if not kind:
            halves = ["#d3d7de", "#5a6473"]
        tall = 0.6 / len(halves)
        for i, colour in enumerate(halves):
            corner = (left, line + 0.2 + i * tall)
            axes.add_patch(Rectangle(corner, _SWATCH, tall, facecolor=colour))
        if len(halves) == 2 and kind:
            frame = Rectangle((left, line + 0.2), _SWATCH, 0.6, **_FRAME)
            axes.add_patch(frame)
        where = (left + _SWATCH * 1.3, line + 0.5)
        axes.text(*where, said, fontsize=9, va="center_baseline")
