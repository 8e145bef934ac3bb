"""What one part of a suite measured."""

from typing import Any, NamedTuple

from experiments.benchmarks.report import Figure


class Part(NamedTuple):
    """Figures, and what `Report` has of settings, samples and wrong results."""

    figures: list[Figure]
    settings: dict[str, Any]
    samples: dict[str, Any]
    wrong: tuple[str, ...] = ()
