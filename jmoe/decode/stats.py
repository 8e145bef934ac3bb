"""What one step of a decoder did, for whoever watches.

Shapes: L MoE layer, E expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class StepStats(NamedTuple):
    """Counts of one step, and how things stand behind it.

    seconds: that it took; with a pipeline, those since the last one that ended. rows:
    sequences that were decoded. prompt_tokens: that were read. new_tokens: that
    requests have got. drafted: tokens that were foretold, and accepted: how many of
    them were right. waiting, live: requests without and with a slot, behind the step.
    pages_used, pages: of the cache, on all devices. count_LE: int, how many of the
    step's real tokens chose each expert of the model's MoE layers, on all devices; the
    MTP module's experts aren't counted. dropped_L: how many of these nobody computed.
    """

    seconds: float
    rows: int
    prompt_tokens: int
    new_tokens: int
    drafted: int
    accepted: int
    waiting: int
    live: int
    pages_used: int
    pages: int
    count_LE: np.ndarray
    dropped_L: np.ndarray


Observe = Callable[[StepStats], None]


def ignore(_: StepStats) -> None:
    """Watches nothing."""
