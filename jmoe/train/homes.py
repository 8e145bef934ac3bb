"""Experts that get other homes between training steps, so that devices do alike.

Every so many steps, what experts had to do since then tells what they will have to, and
some of a layer's experts change devices (`jmoe.balance.homes`): weights, and what the
optimizer keeps of them, by collectives (`jmoe.parallel.homes`). What is computed stays
the same but for the order of sums. A step reads the homes from its state, where they
are next to the biases, and is compiled once.

Only a state in training knows of homes. To be saved, or handed on, experts return to
their places in order, and then go back; a run that goes on begins in order.

Shapes: T step, L MoE layer, E expert.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jmoe.balance import dropping
from jmoe.balance import homes as places
from jmoe.config import RunConfig
from jmoe.nn.model import read_biases, read_homes, with_biases, with_homes
from jmoe.parallel import processes
from jmoe.train.layout import WHOLE, Layout, put_whole
from jmoe.train.moving import make_mover
from jmoe.train.state import TrainState

WINDOW = 64  # steps, at most, that tell what comes


def check(run: RunConfig) -> None:
    """Refuses to re-assign homes where that would change what is computed.

    Raises:
      ValueError: which tokens are dropped depends on where experts live.
    """
    exchange, peers = run.model.moe.exchange, run.mesh.expert
    factor = exchange.capacity_factor
    if not run.train.reassign_every or peers == 1 or exchange.backend == "balanced":
        return
    router = places.keeping_groups(run.model.moe.router, peers)
    if factor is not None and not dropping.is_dropless(factor, router, peers):
        raise ValueError(
            f"model.moe.exchange.capacity_factor={factor} must be none, or leave room "
            f"for all tokens, with train.reassign_every={run.train.reassign_every}: "
            "which tokens are dropped depends on where experts live. Or choose "
            "model.moe.exchange.backend=balanced, which drops none."
        )


class Homes:
    """Re-assigns the homes of a run's experts, by what its steps measured.

    Args:
      make: returns the state that a run begins with; for its shapes.

    Raises:
      ValueError: the optimizer keeps something of experts that can't be moved.
    """

    def __init__(self, run: RunConfig, layout: Layout, make: Callable[[], TrainState]):
        self._cfg, self._peers, self._layout = run.model, run.mesh.expert, layout
        self._every = run.train.reassign_every if self._peers > 1 else 0
        self._above = run.train.reassign_above
        self._loads: collections.deque[jax.Array] = collections.deque(maxlen=WINDOW)
        if self._every:
            self._move = make_mover(run.model, layout, jax.eval_shape(make))
        # Compiled, as they are of arrays that other processes have parts of.
        whole = functools.partial(
            jax.jit, out_shardings=NamedSharding(layout.mesh, WHOLE)
        )
        self._read = whole(functools.partial(read_homes, cfg=self._cfg))
        self._write = whole(functools.partial(with_homes, cfg=self._cfg))
        self._forget = whole(self._biases_alone)

    def begin(self, state: TrainState) -> TrainState:
        """Returns a state whose experts are in order, with their homes.

        Without, if they are never to change.
        """
        self._loads.clear()
        return self._at(state, self._in_order()) if self._every else state

    def add(self, measured: Mapping[str, jax.Array]) -> None:
        """Takes what a step measured."""
        if self._every:
            self._loads.append(measured["load_LE"])

    def is_due(self, step: int) -> bool:
        """Returns whether to re-assign homes after `step`."""
        return self._every > 0 and step % self._every == 0

    def reassign(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state with other homes, and what is logged; donates the state.

        By layer: experts_moved, to another device; home_max_vio and home_max_vio_moved,
        by how much the busiest device exceeds the mean of the load that is expected,
        with the homes before and with those after.
        """
        load_TLE = np.stack(jax.device_get(list(self._loads)))
        self._loads.clear()
        router, home_LE = self._cfg.moe.router, self._homes(state)
        found = places.reassign(load_TLE, home_LE, router, self._peers, self._above)
        # One process decides, as libraries may differ in a rounding.
        chosen = processes.from_first("homes of experts", found.home_LE.tolist)
        measured = {
            "experts_moved_L": found.moved_L,
            "home_max_vio_L": found.before_L,
            "home_max_vio_moved_L": found.after_L,
        }
        return self._go(state, home_LE, np.array(chosen, np.int32)), measured

    def in_order(self, state: TrainState) -> tuple[TrainState, np.ndarray | None]:
        """Returns the state as any run has it, and homes to go back to; donates it."""
        if not self._every:
            return state, None
        home_LE = self._homes(state)
        state = self._go(state, home_LE, self._in_order())
        biases = self._forget(state.router_state)
        return dataclasses.replace(state, router_state=biases), home_LE

    def back(self, state: TrainState, home_LE: np.ndarray | None) -> TrainState:
        """Undoes `in_order`; donates the state."""
        return state if home_LE is None else self._go(state, self._in_order(), home_LE)

    def _in_order(self) -> np.ndarray:
        router, layers = self._cfg.moe.router, len(self._cfg.moe_layer_names)
        return places.in_order(layers, router.num_experts)

    def _biases_alone(self, router_state: Any) -> Any:
        return with_biases({}, read_biases(router_state, self._cfg), self._cfg)

    def _homes(self, state: TrainState) -> np.ndarray:
        return jax.device_get(self._read(state.router_state))

    def _at(self, state: TrainState, home_LE: np.ndarray) -> TrainState:
        placed = put_whole(self._layout, home_LE)
        router_state = self._write(state.router_state, placed)
        return dataclasses.replace(state, router_state=router_state)

    def _go(
        self, state: TrainState, home_LE: np.ndarray, new_LE: np.ndarray
    ) -> TrainState:
        if not np.array_equal(home_LE, new_LE):
            state = self._move(state, home_LE, new_LE)
        return self._at(state, new_LE)
