"""A server's meter on a clock of its own, and what the tests let happen in it."""

import numpy as np

from jmoe.monitor.serving import ServingMeter

LAYERS, EXPERTS, DEVICES = 2, 8, 4


class Clock:
    """Unix time that stands until it is moved."""

    def __init__(self):
        self.now = 1_000_000_000.0

    def __call__(self) -> float:
        return self.now


def make_meter(clock=None, *, layers=LAYERS, experts=EXPERTS, devices=DEVICES):
    return ServingMeter("tiny", layers, experts, devices, clock=clock or Clock())


def step(meter, **changed):
    """Lets the engine take a step; what isn't given is as of two plain requests."""
    stats = {
        **{"seconds": 0.02, "rows": 2, "prompt_tokens": 0, "new_tokens": 2},
        **{"drafted": 0, "accepted": 0, "waiting": 0, "live": 2},
        **{"pages_used": 3, "pages": 10},
        "count_LE": np.ones((LAYERS, EXPERTS), int),
    }
    meter.step(**{**stats, **changed})


def figure(snapshot, name):
    """Returns one figure's value and note."""
    (found,) = (figure for figure in snapshot.figures if figure.name == name)
    return found.value, found.note


def lines(snapshot, title):
    """Returns the lines of one chart."""
    (found,) = (chart for chart in snapshot.charts if chart.title == title)
    return found.lines
