"""What vLLM's own metrics say of a server, for the same page as ours.

vLLM counts from its start on; what it did lately is the difference of two readings of
its `/metrics`. Several engines behind one address, as replicas are, count as one. It
reports no loads of experts.

https://docs.vllm.ai/en/latest/usage/metrics.html
"""

import collections
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from prometheus_client import parser

from jmoe.monitor.latency import Durations, seconds
from jmoe.monitor.snapshot import Chart, Figure, Snapshot

_KEPT = 300  # readings
_RATE_SECONDS = 10.0  # that rates are counted over
_WINDOW_SECONDS = 60.0  # that latencies and shares are counted over
_PATIENCE = 15.0

_COUNTS = {
    "prompt": "vllm:prompt_tokens_total",
    "new": "vllm:generation_tokens_total",
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    "cached": "vllm:prefix_cache_hits_total",
    "looked_up": "vllm:prefix_cache_queries_total",
    "ended": "vllm:request_success_total",
    "preempted": "vllm:num_preemptions_total",
}
_GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
}
_CACHE = "vllm:kv_cache_usage_perc"  # a share, in spite of its name; of each engine
_DURATIONS = {
    "first_token": "vllm:time_to_first_token_seconds",
    "between_tokens": "vllm:inter_token_latency_seconds",
}


class Reading(NamedTuple):
    """What one page of metrics says. durations: counts between bounds, since ever."""

    time: float
    model: str
    counts: Mapping[str, float]
    gauges: Mapping[str, float]
    cache: float | None  # the fullest engine's share in use
    durations: Mapping[str, Durations]


class VllmMeter:
    """Follows a vLLM server by its metrics; any thread may call anything.

    Args:
      clock: Unix time in seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._lock = threading.Lock()
        self._readings: collections.deque[Reading] = collections.deque(maxlen=_KEPT)
        self._text = ""

    def add(self, text: str) -> None:
        """Takes what a server's `/metrics` says now.

        Raises:
          ValueError: it isn't vLLM's.
        """
        reading = read(text, self._clock())
        with self._lock:
            # What counts from 0 again has started again: its past is another's.
            last = self._readings[-1] if self._readings else reading
            if reading.counts["new"] < last.counts["new"]:
                self._readings.clear()
            self._readings.append(reading)
            self._text = text

    def snapshot(self) -> Snapshot:
        with self._lock:
            readings = list(self._readings)
        return snapshot(readings, self._clock())

    def prometheus(self) -> bytes:
        """Returns vLLM's own text, as it was last."""
        with self._lock:
            return self._text.encode()


def read(text: str, now: float) -> Reading:
    """Returns what a page of vLLM's metrics says.

    Raises:
      ValueError: the text isn't Prometheus's, or has no metrics of vLLM.
    """
    by_name: dict[str, list[Any]] = collections.defaultdict(list)
    try:
        for family in parser.text_string_to_metric_families(text):
            for sample in family.samples:
                by_name[sample.name].append(sample)
    except ValueError as error:
        raise ValueError(f"These are no metrics of Prometheus's: {error}") from error
    if not by_name[_COUNTS["new"]]:
        raise ValueError(f"These metrics are not vLLM's: {_COUNTS['new']} is missing.")

    def total(name: str) -> float:
        return sum(sample.value for sample in by_name[name])

    fullest = [sample.value for sample in by_name[_CACHE]]
    return Reading(
        time=now,
        model=by_name[_COUNTS["new"]][0].labels.get("model_name", "vLLM"),
        counts={key: total(name) for key, name in _COUNTS.items()},
        gauges={key: total(name) for key, name in _GAUGES.items()},
        cache=max(fullest, default=None),
        durations={
            key: _durations(by_name[f"{name}_bucket"])
            for key, name in _DURATIONS.items()
        },
    )


def snapshot(readings: Sequence[Reading], now: float) -> Snapshot:
    """Returns what the page shows after these readings, in order of time."""
    if not readings:
        return Snapshot(kind="vllm", model="vLLM", time=now, status="no metrics yet")
    last = readings[-1]
    before = _earlier(readings, last.time - _RATE_SECONDS)
    return Snapshot(
        kind="vllm",
        model=last.model,
        time=last.time,
        status=f"{last.gauges['running']:.0f} running, "
        f"{last.gauges['waiting']:.0f} waiting",
        patience=_PATIENCE,
        figures=tuple(_figures(readings, before, last)),
        charts=tuple(_charts(readings)),
    )


def _figures(
    readings: Sequence[Reading], before: Reading, last: Reading
) -> Iterator[Figure]:
    for name, key in (
        ("tokens per second", "new"),
        ("prompt tokens per second", "prompt"),
    ):
        so_far = f"{last.counts[key]:,.0f} since the start"
        yield Figure(name, _rate(before, last, key), "", so_far)
    ended = f"{last.counts['ended']:,.0f} ended since the start"
    yield Figure("requests running", last.gauges["running"], "", ended)
    preempted = f"{last.counts['preempted']:,.0f} preempted since the start"
    yield Figure("requests waiting", last.gauges["waiting"], "", preempted)
    minute = _earlier(readings, last.time - _WINDOW_SECONDS)
    for name, key in (
        ("time to first token", "first_token"),
        ("time between tokens", "between_tokens"),
    ):
        durations = last.durations[key].since(minute.durations[key])
        p99 = durations.quantile(0.99)
        note = "" if p99 is None else f"p99 {seconds(p99)}"
        yield Figure(name, durations.quantile(0.5), "s", note)
    yield Figure("cache in use", last.cache, "%")
    for name, part, whole in (
        ("prompts found in the cache", "cached", "looked_up"),
        ("drafts accepted", "accepted", "drafted"),
    ):
        if last.counts[whole]:
            share = last.counts[part] / last.counts[whole]
            yield Figure(
                name,
                _share(minute, last, part, whole),
                "%",
                f"{share:.1%} since the start",
            )


def _charts(readings: Sequence[Reading]) -> Iterator[Chart]:
    pairs = list(itertools.pairwise(readings))
    time_N = [last.time for _, last in pairs]

    def chart(
        title: str,
        unit: str,
        **lines: Callable[[Reading, Reading], float | None],
    ) -> Chart:
        drawn = {
            name: [read(before, last) for before, last in pairs]
            for name, read in lines.items()
        }
        return Chart(title, unit, "time", time_N, drawn)

    yield chart(
        "Tokens per second",
        "",
        new=lambda before, last: _rate(before, last, "new"),
        prompt=lambda before, last: _rate(before, last, "prompt"),
    )
    yield chart(
        "Requests",
        "",
        running=lambda _, last: last.gauges["running"],
        waiting=lambda _, last: last.gauges["waiting"],
    )
    for title, key in (
        ("Time to first token", "first_token"),
        ("Time between tokens", "between_tokens"),
    ):
        yield chart(title, "s", median=_quantile(key, 0.5), p99=_quantile(key, 0.99))
    yield chart("Cache in use", "%", share=lambda _, last: last.cache)
    if readings[-1].counts["drafted"]:
        yield chart(
            "Drafts accepted",
            "%",
            share=lambda before, last: _share(before, last, "accepted", "drafted"),
        )


def _earlier(readings: Sequence[Reading], when: float) -> Reading:
    """Returns the last reading from before a time, or else the first."""
    found = [reading for reading in readings if reading.time <= when]
    return found[-1] if found else readings[0]


def _rate(before: Reading, last: Reading, key: str) -> float | None:
    passed = last.time - before.time
    return (last.counts[key] - before.counts[key]) / passed if passed > 0 else None


def _share(before: Reading, last: Reading, part: str, whole: str) -> float | None:
    parts, wholes = (last.counts[key] - before.counts[key] for key in (part, whole))
    return parts / wholes if wholes > 0 else None


def _quantile(key: str, q: float) -> Callable[[Reading, Reading], float | None]:
    def read(before: Reading, last: Reading) -> float | None:
        return last.durations[key].since(before.durations[key]).quantile(q)

    return read


def _durations(samples: Sequence[Any]) -> Durations:
    """Returns what all engines' buckets, which count from 0 up, have together."""
    below: dict[float, float] = collections.defaultdict(float)
    for sample in samples:
        below[float(sample.labels["le"])] += sample.value
    bounds = sorted(bound for bound in below if math.isfinite(bound))
    found = Durations(tuple(bounds))
    count_B = [below[bound] for bound in (*bounds, math.inf)]
    found.count_B = np.diff(count_B, prepend=0).astype(np.int64)
    return found
