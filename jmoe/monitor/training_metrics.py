"""A training run's families of metrics, as Prometheus reads them.

Shapes: L MoE layers, P devices.
"""

from collections.abc import Iterator

import numpy as np
from prometheus_client import core

from jmoe.monitor import prometheus
from jmoe.monitor.prometheus import array, counter, gauge
from jmoe.monitor.snapshot import device_load, even_share
from jmoe.monitor.training_page import About, Standing

# name, what it is, what it is logged as
_GAUGES = (
    ("jmoe_train_loss", "Training loss of the last step logged.", "loss"),
    ("jmoe_train_validation_loss", "Loss of the last evaluation.", "val_loss"),
    ("jmoe_train_global_max_vio", "MaxVio over the validation set.", "global_max_vio"),
    ("jmoe_train_tokens_per_second", "Speed since the last log.", "tokens_per_second"),
    ("jmoe_train_step_seconds", "Time of a step, on average.", "step_seconds"),
    ("jmoe_train_grad_norm", "Gradient norm, before clipping.", "grad_norm"),
    ("jmoe_train_learning_rate", "Learning rate.", "learning_rate"),
    ("jmoe_train_bias_rate", "Rate of the bias update.", "bias_rate"),
    ("jmoe_train_skipped_steps", "Steps that were skipped.", "skipped"),
    ("jmoe_train_roll_backs", "Times the run went back.", "rolled_back"),
)
_OF_LAYERS = (
    ("jmoe_train_max_vio", "MaxVio of the last batch logged.", "max_vio_L"),
    ("jmoe_train_drop_rate", "Share of choices that none computed.", "drop_rate_L"),
    ("jmoe_train_dead_experts", "Experts that nobody chose.", "dead_experts_L"),
    ("jmoe_train_experts_lent", "Experts lent in a step.", "experts_lent_L"),
)


def page(about: About, state: Standing) -> bytes:
    """Returns the text of a run's metrics; what wasn't logged isn't there."""
    return prometheus.page(list(_families(about, state)))


def _families(about: About, state: Standing) -> Iterator[core.Metric]:
    run = {"run": about.name, "device": about.device}
    yield prometheus.information("jmoe_run", "The run that trains.", run)
    yield gauge("jmoe_train_step", "The last step logged.", state.step)
    yield gauge("jmoe_train_steps", "Steps that the run has.", about.steps)
    tokens = state.number("tokens")
    if tokens is not None:
        yield counter("jmoe_train_tokens", "Tokens trained on.", tokens)
    for name, text, key in _GAUGES:
        value = state.number(key)
        if value is not None:
            yield gauge(name, text, value)
    for name, text, key in _OF_LAYERS:
        if key in state.metrics:
            value_L = np.asarray(state.metrics[key])
            yield array(core.GaugeMetricFamily, name, text, ["layer"], value_L)
    if state.load_LE is not None:
        yield array(
            core.GaugeMetricFamily,
            "jmoe_train_device_load",
            "Load in units of the even share, by layer and device.",
            ["layer", "device"],
            device_load(even_share(state.load_LE), about.num_devices),
        )
