"""A page in Prometheus's text format, from numbers that are kept elsewhere.

Families are made when the page is asked for, so that counting costs no library's calls.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import prometheus_client
from prometheus_client import core, registry

from jmoe.monitor.latency import Durations


class _Families(registry.Collector):
    def __init__(self, families: Iterable[core.Metric]):
        self._families = families

    def collect(self) -> Iterable[core.Metric]:
        return self._families


def page(families: Sequence[core.Metric]) -> bytes:
    """Returns the text of these families, from a registry of their own."""
    own = registry.CollectorRegistry()
    own.register(_Families(families))
    return prometheus_client.generate_latest(own)


def counter(name: str, text: str, value: float) -> core.Metric:
    return core.CounterMetricFamily(name, text, value=value)


def counters(
    name: str, text: str, label: str, values: Mapping[str, float]
) -> core.Metric:
    """Returns a counter for each value of one label."""
    family = core.CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def gauge(name: str, text: str, value: float) -> core.Metric:
    return core.GaugeMetricFamily(name, text, value=value)


def array(
    kind: type, name: str, text: str, labels: Sequence[str], values: np.ndarray
) -> core.Metric:
    """Returns a sample for each element of `values`, labelled with its indices.

    Args:
      kind: core.CounterMetricFamily or core.GaugeMetricFamily.
      labels: names of the dimensions.
    """
    family = kind(name, text, labels=labels)
    for index, value in np.ndenumerate(values):
        family.add_metric([str(at) for at in index], float(value))
    return family


def histogram(name: str, text: str, durations: Durations) -> core.Metric:
    ends = [*map(str, durations.bounds), "+Inf"]
    counts = durations.count_B.cumsum().tolist()
    return core.HistogramMetricFamily(
        name,
        text,
        buckets=list(zip(ends, counts, strict=True)),
        sum_value=durations.total,
    )


def information(name: str, text: str, labels: Mapping[str, str]) -> core.Metric:
    """Returns a gauge of 1 that has only its labels to say."""
    family = core.GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
