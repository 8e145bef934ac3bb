"""What a server counts from its start on.

Shapes: L MoE layers, E routed experts, P devices.
"""

import collections
import dataclasses

import numpy as np

from jmoe.monitor import latency


@dataclasses.dataclass
class Totals:
    """What has happened since the server's start, and how things stand."""

    count_LE: np.ndarray  # choices of experts
    device_LP: np.ndarray  # choices that devices computed
    dropped_L: np.ndarray  # choices that none computed
    steps: latency.Durations
    first_token: latency.Durations
    between_tokens: latency.Durations
    rows: int = 0  # sequences decoded, summed over steps
    prompt_tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    experts_moved: int = 0
    experts_lent: int = 0
    fp8_steps: int = 0  # whose tokens travelled to experts in FP8
    in_fp8: bool = False  # whether those of the last step did
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages: int = 0
    requests: int = 0
    answered_tokens: int = 0
    ended: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )  # by reason
    refused: collections.Counter[int] = dataclasses.field(
        default_factory=collections.Counter
    )  # by HTTP status
    last_step: float = 0.0  # Unix time of its end
