"""Timelines of pipeline schedules for a terminal, in colours or in letters alone."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import rich.console
from rich.style import Style
from rich.text import Text

from jmoe.parallel.schedule import Timeline
from jmoe.plan.timeline import LATER, TaskPart, has_later, kinds, number, parts

_WIDEST = 6  # columns for the shortest of tasks: more shows nothing more


def lines(
    timelines: Sequence[Timeline], console: rich.console.Console
) -> Iterator[Text]:
    """Yields what to print to show timelines on one scale, within the console's width.

    Where a task has too few columns, its microbatch is left out, or the task itself.
    """
    margin = max(len(str(t.schedule.num_ranks - 1)) for t in timelines) + 1
    scale = _scale(timelines, console.width - margin)
    plain = console.color_system is None
    for timeline in timelines:
        yield Text(timeline.schedule.name, style="bold")
        for rank, spans in enumerate(timeline.spans):
            row = Text(f"{rank:>{margin - 1}} ", no_wrap=True)
            for span in spans:
                # Both ends are rounded, not the length: neighbours share a border.
                start, end = round(span.start * scale), round(span.end * scale)
                row.append(" " * (margin + start - len(row)))
                found = parts(timeline.schedule, rank, span.task)
                if plain:
                    room = int((span.end - span.start) * scale)
                    most = len(str(timeline.schedule.num_microbatches - 1))
                    row.append(f"{_letters(found, room, most):-<{end - start}}")
                else:
                    row.append_text(_blocks(found, end - start))
            yield row
        yield Text()
    yield from _key(timelines, plain)
    yield Text(f"A column is {number(1 / scale)} of the costs' unit of time.")


def _scale(timelines: Sequence[Timeline], width: int) -> Fraction:
    """Returns columns for a unit of time: whole ones for the shortest task, if any."""
    spans = [span for t in timelines for spans in t.spans for span in spans]
    shortest = Fraction(min(filter(None, (end - start for _, start, end in spans))))
    scale = Fraction(width) / Fraction(max(t.makespan for t in timelines))
    columns = int(scale * shortest)
    return min(columns, _WIDEST) / shortest if columns else scale


def _letters(found: list[TaskPart], room: int, digits: int) -> str:
    """Returns the most that fits, in small letters for the later of a rank's stages.

    All tasks of a kind say as much, whether rounding gave them a column more and
    whether their microbatch has all of the digits.
    """
    for letters, numbered in ((2, True), (1, True), (2, False), (1, False)):
        names = [part.kind[:letters] for part in found]
        if (
            sum(map(len, names)) + len(names) - 1 + numbered * digits * len(names)
            > room
        ):
            continue
        return "&".join(
            (name.lower() if part.is_later else name) + str(part.microbatch) * numbered
            for name, part in zip(names, found, strict=True)
        )
    return "&"[: room * (len(found) - 1)]


def _blocks(found: list[TaskPart], width: int) -> Text:
    """Returns microbatches on their kind's colour.

    A pair is side by side and underlined.
    """
    widths = [width] if len(found) == 1 else [width - width // 2, width // 2]
    text = Text()
    for part, columns in zip(found, widths, strict=True):
        label = str(part.microbatch)
        # A space must be left between it and the next one.
        label = f"{label:<{columns}}" if len(label) < columns else " " * columns
        text.append(label, style=_style(part, underline=len(found) == 2))
    return text


def _style(part: TaskPart, underline: bool) -> Style:
    return Style(color=part.ink, bgcolor=part.colour, underline=underline)


def _key(timelines: Sequence[Timeline], plain: bool) -> Iterator[Text]:
    """Yields what colours or letters mean, as far as they occur."""
    for kind, meaning in kinds(timelines).items():
        text = Text(f"{kind:<5}" if plain else "")
        names = () if plain else kind.split("&")
        for name in names:
            style = _style(TaskPart(name, 0, Fraction(0)), underline=len(names) > 1)
            text.append("   "[: 4 // len(names)], style=style)
        yield text.append(f" {meaning}")
    if has_later(timelines):
        yield Text(f"{'small' if plain else 'dark'}: {LATER}")
