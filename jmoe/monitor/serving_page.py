"""What the page shows of a server: how it stands, and its last minutes.

Shapes: L MoE layers, E routed experts, P devices, N parts of time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jmoe.monitor import recent
from jmoe.monitor.decisions import Decision
from jmoe.monitor.latency import seconds
from jmoe.monitor.recent import FiveSeconds, Recent
from jmoe.monitor.serving_totals import Totals
from jmoe.monitor.snapshot import (
    Chart,
    Figure,
    Snapshot,
    even_share,
    max_violation_L,
)

_PATIENCE = 20.0  # seconds for a step, above all one that compiles


class Lately(NamedTuple):
    """What is read off the last minutes at once."""

    new_rate: float  # tokens a second
    prompt_rate: float
    first_token: tuple[float | None, float | None]  # median and 99th percentile
    between_tokens: tuple[float | None, float | None]
    acceptance: float | None
    counts: tuple[np.ndarray, np.ndarray] | None  # choices [L, E], [L, P]
    charts: tuple[Chart, ...]


def lately(parts: Recent, now: float) -> Lately:
    """Returns what a server did before `now`; nothing of it is shared with `parts`."""
    minute = parts.latest()
    drafted = sum(part.drafted for part in minute)
    accepted = sum(part.accepted for part in minute)
    return Lately(
        parts.rate(now, lambda part: part.new_tokens),
        parts.rate(now, lambda part: part.prompt_tokens),
        (parts.quantile("first_token", 0.5), parts.quantile("first_token", 0.99)),
        (
            parts.quantile("between_tokens", 0.5),
            parts.quantile("between_tokens", 0.99),
        ),
        accepted / drafted if drafted else None,
        parts.counts(),
        tuple(_charts(parts, now)),
    )


def make(
    name: str,
    now: float,
    totals: Totals,
    shown: Lately,
    decisions: Sequence[Decision],
) -> Snapshot:
    """Returns the snapshot of a server."""
    load_LE = vio_L = device_load_LP = None
    note = ""
    if shown.counts is not None:
        count_LE, device_LP = shown.counts
        load_LE, device_load_LP = even_share(count_LE), even_share(device_LP)
        vio_L = max_violation_L(load_LE)
        choices = int(count_LE.sum()) // max(1, len(count_LE))
        window = recent.WINDOW * recent.SECONDS
        note = f"{choices:,} choices a layer, within {window} s"
    is_busy = totals.running + totals.waiting > 0
    return Snapshot(
        kind="serving",
        model=name,
        time=totals.last_step if is_busy else now,
        status=f"{totals.running} running, {totals.waiting} waiting"
        if is_busy
        else "idle",
        patience=_PATIENCE if is_busy else None,
        figures=tuple(_figures(totals, shown, vio_L)),
        charts=shown.charts,
        load_LE=load_LE,
        max_vio_L=vio_L,
        device_load_LP=device_load_LP if totals.device_LP.shape[1] > 1 else None,
        load_note=note,
        decisions=decisions,
    )


def _figures(
    totals: Totals, shown: Lately, vio_L: np.ndarray | None
) -> Iterator[Figure]:
    total = f"{totals.new_tokens:,} since the start"
    yield Figure("tokens per second", shown.new_rate, "", total)
    prompts = f"{totals.prompt_tokens:,} since the start"
    yield Figure("prompt tokens per second", shown.prompt_rate, "", prompts)
    admitted = f"{totals.requests:,} since the start"
    yield Figure("requests running", totals.running, "", admitted)
    yield Figure("requests waiting", totals.waiting, "", _refused(totals))
    for title, (median, p99) in (
        ("time to first token", shown.first_token),
        ("time between tokens", shown.between_tokens),
    ):
        yield Figure(title, median, "s", "" if p99 is None else f"p99 {seconds(p99)}")
    if totals.drafted:
        drafts = f"{totals.accepted / totals.drafted:.1%} since the start"
        yield Figure("drafts accepted", shown.acceptance, "%", drafts)
    if totals.pages:
        pages = f"{totals.pages_used:,} of {totals.pages:,} pages"
        yield Figure("cache in use", totals.pages_used / totals.pages, "%", pages)
    if vio_L is not None:
        worst = f"layer {vio_L.argmax()} has {vio_L.max():.2f}"
        yield Figure("MaxVio", float(vio_L.mean()), "", worst)
    yield from _figures_of_experts(totals)


def _figures_of_experts(totals: Totals) -> Iterator[Figure]:
    """Yields what few servers have, once this one has had it."""
    dropped = int(totals.dropped_L.sum())
    if dropped:
        share = dropped / max(1, int(totals.count_LE.sum()))
        yield Figure("choices dropped", share, "%", f"{dropped:,} since the start")
    if totals.experts_moved:
        yield Figure("experts moved", totals.experts_moved, "", "since the start")
    if totals.experts_lent:
        yield Figure("experts lent", totals.experts_lent, "", "since the start")
    if totals.fp8_steps:
        share = totals.fp8_steps / int(totals.steps.count_B.sum())
        now = "tokens travel so now" if totals.in_fp8 else "not now"
        yield Figure("steps in FP8", share, "%", now)


def _refused(totals: Totals) -> str:
    refused = sum(totals.refused.values())
    return f"{refused:,} refused since the start" if refused else "none was refused"


def _charts(parts: Recent, now: float) -> Iterator[Chart]:
    history = list(parts.history(now))
    if not history:
        return
    index_N = [item if isinstance(item, int) else item.index for item in history]
    time_N = [(index + 1) * recent.SECONDS for index in index_N]

    def line(
        read: Callable[[FiveSeconds], float | None], nothing: float | None = None
    ) -> list[float | None]:
        """Returns what is read of each part, and `nothing` where there is none."""
        return [nothing if isinstance(item, int) else read(item) for item in history]

    def lasting(read: Callable[[FiveSeconds], float]) -> list[float | None]:
        """Returns what stays as it is until the next part: a step may be longer."""
        found: list[float | None] = []
        for item in history:
            before = found[-1] if found else 0
            found.append(before if isinstance(item, int) else read(item))
        return found

    def chart(title: str, unit: str, **lines: list[float | None]) -> Chart:
        named = {name.replace("_", " "): line_N for name, line_N in lines.items()}
        return Chart(title, unit, "time", time_N, named)

    yield chart(
        "Tokens per second",
        "",
        new=line(lambda part: part.new_tokens / recent.SECONDS, 0),
        prompt=line(lambda part: part.prompt_tokens / recent.SECONDS, 0),
    )
    yield chart(
        "Requests",
        "",
        running=lasting(lambda part: part.running),
        waiting=lasting(lambda part: part.waiting),
    )
    for title, name in (
        ("Time to first token", "first_token"),
        ("Time between tokens", "between_tokens"),
    ):
        yield chart(
            title,
            "s",
            median=line(lambda part, name=name: getattr(part, name).quantile(0.5)),
            p99=line(lambda part, name=name: getattr(part, name).quantile(0.99)),
        )
    yield chart(
        "Balance: MaxVio",
        "",
        median_layer=line(lambda part: part.max_vio and part.max_vio[0]),
        worst_layer=line(lambda part: part.max_vio and part.max_vio[1]),
    )
    if any(not isinstance(item, int) and item.drafted for item in history):
        share = line(
            lambda part: part.accepted / part.drafted if part.drafted else None
        )
        yield chart("Drafts accepted", "%", share=share)
