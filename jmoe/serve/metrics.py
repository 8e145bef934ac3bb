"""One Prometheus page for all replicas."""
# pyright: reportMissingImports=false

from collections.abc import Iterable, Mapping

import prometheus_client
from prometheus_client import parser
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry


class Merged(Collector):
    """Families of several pages, each sample labelled with the replica it is from."""

    def __init__(self, pages: Mapping[str, str]):
        self._families: dict[str, Metric] = {}
        for replica, page in pages.items():
            for family in parser.text_string_to_metric_families(page):
                self._add(family, {"replica": replica})

    def _add(self, family: Metric, labels: Mapping[str, str]) -> None:
        merged = self._families.setdefault(
            family.name, Metric(family.name, family.documentation, family.type)
        )
        merged.samples += [
            sample._replace(labels={**sample.labels, **labels})
            for sample in family.samples
        ]

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


def merge(pages: Mapping[str, str]) -> str:
    """Returns the page of all replicas.

    Args:
      pages: by the replica's name, each in Prometheus's text format.
    """
    registry = CollectorRegistry()
    registry.register(Merged(pages))
    return prometheus_client.generate_latest(registry).decode()
