"""What the page shows of a training run, from what it has logged.

Shapes: L MoE layers, E routed experts, P devices, N points of a chart.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmoe.data.formatting import count, duration
from jmoe.monitor.decisions import Decision
from jmoe.monitor.snapshot import (
    Chart,
    Figure,
    Snapshot,
    device_load,
    even_share,
    max_violation_L,
)

# Of a run that is silent for so many times its usual pause something is wrong,
_PATIENCE = 10
_MIN_PATIENCE = 60.0  # but an evaluation or a checkpoint takes a while

# title, unit, and the lines: what they are called, and what is logged of them
_CHARTS = (
    ("Loss", "", {"training": "loss", "validation": "val_loss"}),
    (
        "Balance: MaxVio of a batch",
        "",
        {"median layer": "max_vio_p50", "worst layer": "max_vio_max"},
    ),
    ("Tokens per second", "", {"tokens": "tokens_per_second"}),
    ("Gradient norm, before clipping", "", {"norm": "grad_norm"}),
    ("Learning rate", "", {"rate": "learning_rate"}),
    ("Choices dropped", "%", {"share": "drop_rate"}),
    (
        "Busiest device above the mean",
        "%",
        {"without lending": "device_max_vio", "with lending": "device_max_vio_lent"},
    ),
    ("Experts lent a step", "", {"of all layers": "experts_lent"}),
)
_OF_LAYERS = {  # of what is logged of each layer, one number
    "drop_rate": np.mean,
    "device_max_vio": np.mean,
    "device_max_vio_lent": np.mean,
    "experts_lent": np.sum,
    "dead_experts": np.sum,
}


class About(NamedTuple):
    """What of a run stays as it is."""

    name: str
    steps: int
    num_devices: int
    device: str


@dataclasses.dataclass
class Standing:
    """Says where a run stands. metrics: by key, each as it was logged last."""

    time: float  # of the last log, Unix in seconds
    step: int = 0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    load_LE: np.ndarray | None = None  # of the batch of `load_step`
    load_step: int = 0
    first: tuple[int, float] | None = None  # step and time of the first log
    pause: float | None = None  # between the last two logs
    ended: str = ""

    def logged(self, step: int, metrics: Mapping[str, Any], now: float) -> None:
        if self.first is None or step < self.step:  # or the run went back
            self.first = step, now
        elif step > self.step:
            self.pause = now - self.time
        self.step, self.time = step, now
        self.metrics |= metrics

    def copy(self) -> "Standing":
        return dataclasses.replace(self, metrics=dict(self.metrics))

    def number(self, key: str) -> float | None:
        """Returns a scalar, or one number of what is logged of each layer."""
        return _number(self.metrics, key)

    def text(self, key: str, form: str) -> str:
        """Returns a number in words; nothing if there is none."""
        value = self.number(key)
        return "" if value is None else form.format(value)


def kept(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns what charts need of a row."""
    keys = (key for _, _, lines in _CHARTS for key in lines.values())
    found = {key: _number(metrics, key) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def reassigned(now: float, step: int, metrics: Mapping[str, Any]) -> Decision:
    """Returns the decision to give experts other homes (`jmoe.train.homes`)."""
    moved = int(np.sum(metrics["experts_moved_L"]))
    keys = "home_max_vio_L", "home_max_vio_moved_L"
    before, after = (float(np.mean(metrics[key])) for key in keys)
    reason = f"the busiest device was {before:.1%} above the mean, on average of layers"
    change = f"step {step:,}: experts stay where they are"
    if moved:
        change = f"step {step:,}: {moved} experts moved to other devices"
        reason += f"; with the new homes {after:.1%} are expected"
    return Decision(now, "homes", reason, change)


def make(
    about: About,
    state: Standing,
    logs: Sequence[tuple[int, Mapping[str, float]]],
    evaluations: Sequence[tuple[int, Mapping[str, float]]],
    notes: Sequence[Decision],
) -> Snapshot:
    """Returns the snapshot of a run.

    Args:
      logs, evaluations: step, and what is `kept`.
    """
    load_LE = vio_L = device_load_LP = None
    note = ""
    if state.load_LE is not None:
        load_LE = even_share(state.load_LE)
        vio_L = max_violation_L(load_LE)
        note = f"the batch of step {state.load_step:,}"
        if about.num_devices > 1:
            device_load_LP = device_load(load_LE, about.num_devices)
    patience = None
    if state.pause is not None and not state.ended:
        patience = max(_MIN_PATIENCE, _PATIENCE * state.pause)
    return Snapshot(
        kind="training",
        model=about.name,
        time=state.time,
        status=_status(about, state),
        patience=patience,
        figures=tuple(_figures(state, vio_L)),
        charts=tuple(_charts(logs, evaluations)),
        load_LE=load_LE,
        max_vio_L=vio_L,
        device_load_LP=device_load_LP,
        load_note=note,
        decisions=notes,
    )


def _status(about: About, state: Standing) -> str:
    where = f" · {about.device}" if about.device else ""
    if state.first is None:
        return f"compiling{where}"
    said = f"step {state.step:,} of {about.steps:,}"
    if state.ended:
        return f"{said} · {state.ended}{where}"
    first_step, first_time = state.first
    if state.step > first_step:  # compilation came before that
        pace = (state.time - first_time) / (state.step - first_step)
        said += f" · {duration(pace * (about.steps - state.step))} left"
    return said + where


def _figures(state: Standing, vio_L: np.ndarray | None) -> Iterator[Figure]:
    number, text = state.number, state.text
    yield Figure("training loss", number("loss"), "", text("mtp_loss", "MTP {:.3f}"))
    if (validation := number("val_loss")) is not None:
        perplexity = text("val_perplexity", "perplexity {:.2f}")
        yield Figure("validation loss", validation, "", perplexity)
    tokens = number("tokens")
    so_far = "" if tokens is None else f"{count(tokens)} so far"
    yield Figure("tokens per second", number("tokens_per_second"), "", so_far)
    yield Figure("time of a step", number("step_seconds"), "s")
    if vio_L is not None:
        worst = f"layer {vio_L.argmax()} has {vio_L.max():.2f}"
        yield Figure("MaxVio of a batch", float(vio_L.mean()), "", worst)
    if (overall := number("global_max_vio")) is not None:
        worst = text("global_max_vio_max", "worst layer {:.2f}")
        yield Figure("global MaxVio", overall, "", worst)
    clipped = "before clipping"
    yield Figure("gradient norm", number("grad_norm"), "", clipped)
    bias = text("bias_rate", "bias rate {:.2g}")
    yield Figure("learning rate", number("learning_rate"), "", bias)
    for name, key, unit, note in (
        ("choices dropped", "drop_rate", "%", "of the last batch"),
        ("dead experts", "dead_experts", "", "that no token of the batch chose"),
        ("experts lent", "experts_lent", "", "in the last step"),
        ("steps skipped", "skipped", "", ""),
        ("rolled back", "rolled_back", "", "times"),
    ):
        if number(key):
            yield Figure(name, number(key), unit, note)


def _charts(
    logs: Sequence[tuple[int, Mapping[str, float]]],
    evaluations: Sequence[tuple[int, Mapping[str, float]]],
) -> Iterator[Chart]:
    rows: dict[int, dict[str, float]] = {}
    for step, values in (*logs, *evaluations):
        rows.setdefault(step, {}).update(values)
    step_N = sorted(rows)
    for title, unit, lines in _CHARTS:
        drawn = {
            name: [rows[step].get(key) for step in step_N]
            for name, key in lines.items()
        }
        drawn = {name: line_N for name, line_N in drawn.items() if any(line_N)}
        if drawn:
            yield Chart(title, unit, "step", step_N, drawn)


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    if key in metrics:
        return float(np.mean(metrics[key]))  # MTP has a loss for each depth
    if key in _OF_LAYERS and f"{key}_L" in metrics:
        return float(_OF_LAYERS[key](metrics[f"{key}_L"]))
    return None
