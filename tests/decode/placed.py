"""Engines whose experts may move, on a small pipeline, or whose tokens' form may."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jmoe.balance import placement
from jmoe.config import ModelConfig, override
from jmoe.config.model import ACTIVATIONS, FLOAT8, WIRE_DTYPES
from jmoe.decode.engine import Engine
from jmoe.decode.limits import Limits
from jmoe.decode.on_mesh import make_programs
from jmoe.decode.placing import begin_with, system
from jmoe.decode.requests import Sampling
from jmoe.decode.stats import Observe, ignore
from jmoe.parallel.shedding import NO_LIMIT
from tests.decode.conftest import random_variables
from tests.decode.test_on_mesh import placed

LIMITS = Limits(rows=(2,), prompts=(2,), chunks=(8,), max_length=64, page_size=8)
DEVICES, SPARE = 2, 4
MESH = "pipe=2,expert=2"
PROMPTS = [[7], [3, 250, 250], list(range(20, 40)), [5] * 9]


class Watcher:
    """What an engine tells of its steps goes to whoever watches now."""

    def __init__(self):
        self.observe: Observe = ignore

    def __call__(self, stats) -> None:
        self.observe(stats)


@functools.cache
def engine(cfg: ModelConfig) -> tuple[Engine, Any, Watcher]:
    """One with experts on both ranks of a pipeline; its variables; who watches it.

    It drops nothing, but may.
    """
    model = override(cfg, ["num_layers=3"])
    variables, watcher = random_variables(model), Watcher()
    run, layout, divided = placed(MESH, [], variables, model)
    begin = begin_with(model, DEVICES, SPARE)
    programs = make_programs(run, layout.mesh, placed=begin, limit=NO_LIMIT)
    made = Engine(model, divided, LIMITS, programs=programs, observe=watcher)
    return made, variables, watcher


def switching_engine(cfg: ModelConfig) -> tuple[Engine, Watcher]:
    """One whose tokens may travel in FP8, but don't; and who watches it."""
    found = _switching_engine(cfg)
    found[0].programs.set_dispatch_dtype(ACTIVATIONS)
    return found


@functools.cache
def _switching_engine(cfg: ModelConfig) -> tuple[Engine, Watcher]:
    variables, watcher = random_variables(cfg), Watcher()
    run, layout, divided = placed("expert=2", [], variables)
    programs = make_programs(run, layout.mesh, dispatch_dtypes=WIRE_DTYPES)
    made = Engine(cfg, divided, LIMITS, programs=programs, observe=watcher)
    return made, watcher


@functools.cache
def fp8_engine(cfg: ModelConfig) -> Engine:
    """One like it whose tokens always do, with programs of its own."""
    model = override(cfg, [f"moe.exchange.dispatch_dtype={FLOAT8}"])
    run, layout, divided = placed("expert=2", [], random_variables(cfg), model)
    programs = make_programs(run, layout.mesh)
    return Engine(model, divided, LIMITS, programs=programs)


def any_placement(model: ModelConfig, seed: int) -> placement.Placement:
    """One for a load of chance."""
    rng, own = np.random.default_rng(seed), system(model, DEVICES)
    experts = model.moe.router.num_experts
    load_LE = rng.random((model.num_moe_layers, experts)) ** 4
    sizes = experts + SPARE, own.groups, own.nodes, DEVICES
    return placement.place(load_LE, *sizes)


def completed(engine: Engine, between: Callable[[], Any] = lambda: None) -> list:
    """The tokens of all prompts, with something done between any two steps."""
    numbers = [engine.submit(x, Sampling(max_new_tokens=20)) for x in PROMPTS]
    found = {}
    while not engine.is_idle:
        found |= {done.number: done.tokens for done, _ in engine.step()}
        between()
    return [found[number] for number in numbers]
