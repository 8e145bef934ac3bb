"""What the live page shows of a run or a server at one moment.

The page draws a snapshot and knows nothing else: neither what trains or serves, nor
what came before. So it is right after a reload, and after a restart of what it watches.

Shapes: L MoE layers, E routed experts, P devices, N points of a chart.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmoe.monitor.decisions import Decision

KINDS = ("serving", "training", "vllm")
_DIGITS = 4  # more than the page shows


class Figure(NamedTuple):
    """One number of the head of the page; None reads "not yet", NaN as it is.

    unit: stands behind the number; "%" has a fraction shown as percent, "s" seconds as
    what suits them.
    """

    name: str
    value: float | None
    unit: str = ""
    note: str = ""  # what else to say of it, in small print


class Chart(NamedTuple):
    """Lines over time or over steps, one point an x; None where nothing was measured.

    x: "time", Unix in seconds, or "step".
    """

    title: str
    unit: str
    x: str
    x_N: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One moment of a run or a server.

    `time` is when its numbers were measured, Unix in seconds. If nothing new comes for
    `patience` seconds after it, something is wrong; None: silence is no bad sign.

    Loads are in units of the even share: 1 is balanced, and a layer that chose nothing
    has zeros.
    """

    kind: str
    model: str
    time: float
    status: str  # such as "step 400 of 2,000"
    patience: float | None = None
    figures: Sequence[Figure] = ()
    charts: Sequence[Chart] = ()
    load_LE: np.ndarray | None = None
    max_vio_L: np.ndarray | None = None
    device_load_LP: np.ndarray | None = None
    load_note: str = ""  # what loads were counted over
    decisions: Sequence[Decision] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}.")

    def to_json(self) -> str:
        """Returns an object of these fields.

        What isn't finite becomes null, or the text "NaN" or "Infinity" in a figure.
        """
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        for name in ("figures", "charts", "decisions"):
            fields[name] = [item._asdict() for item in fields[name]]
        for figure in fields["figures"]:
            figure["value"] = _in_words(figure["value"])
        return json.dumps(_plain(fields), allow_nan=False, separators=(",", ":"))


def even_share(count_LX: np.ndarray) -> np.ndarray:
    """Returns counts of experts or devices in units of their layer's mean, float64."""
    mean_L1 = count_LX.mean(-1, keepdims=True, dtype=np.float64)
    return count_LX / np.where(mean_L1 > 0, mean_L1, 1)


def max_violation_L(load_LE: np.ndarray) -> np.ndarray:
    """Returns MaxVio of each layer, of loads in units of the even share.

    `jmoe.balance.load` computes the same on devices, which watching must not use.
    """
    return np.maximum(load_LE.max(-1) - 1, 0)


def device_load(load_LE: np.ndarray, num_devices: int) -> np.ndarray:
    """Returns loads [L, P] of devices that hold consecutive experts, each as many."""
    by_device_LPM = load_LE.reshape(len(load_LE), num_devices, -1)
    return by_device_LPM.mean(-1)


def _in_words(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _plain(value: Any) -> Any:
    """Returns what JSON can hold, numbers rounded."""
    if isinstance(value, np.ndarray):
        is_finite = np.isfinite(value).all()
        # A big model has 15,000 loads: one by one they would take 20 ms a second.
        return value.round(3).tolist() if is_finite else _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    # Unix times have more digits before the point than are worth keeping behind it.
    return round(value, 2) if abs(value) >= 1000 else float(f"{value:.{_DIGITS}g}")
