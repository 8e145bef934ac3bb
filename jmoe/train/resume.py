"""The state that a run begins with, or goes on with."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jmoe.checkpoint import pieces
from jmoe.checkpoint.store import Store
from jmoe.data.loader import Loader
from jmoe.train import guard
from jmoe.train import layout as layouts
from jmoe.train.saving import GUARD
from jmoe.train.state import TrainState, require_step


class Begun(NamedTuple):
    """guard: what the guard had seen until `step`; None: nothing."""

    state: TrainState
    step: int
    guard: Mapping[str, Any] | None


def begin(
    make: Callable[[], TrainState],
    layout: layouts.Layout,
    store: Store,
    loader: Loader,
) -> Begun:
    """Reads the newest whole checkpoint, or makes a state where there is none.

    The loader then stands where the data go on.

    Raises:
      FileNotFoundError: there are checkpoints, and none is whole.
      ValueError: the checkpoint isn't finite, or of another step, model or data.
    """
    start = {**loader.get_state(), "sequences": 0}
    if store.latest_step() is None:
        loader.set_state(start)
        return Begun(layouts.born(layout, make), 0, None)
    abstract = layouts.abstract(layout, make)
    if _holds_weights_only(store):
        state, step, position = _restore_weights(make, layout, abstract, store), 0, {}
    else:
        state, position, step = store.restore(abstract)
    where = store.locate(step)
    require_step(state, step, where)
    loader.set_state(position or start)
    guard.require_finite(state, where)
    return Begun(state, step, position.get(GUARD))


def _holds_weights_only(store: Store) -> bool:
    """Returns whether the checkpoint was imported, and has nothing of an optimizer."""
    stored = pieces.Pieces(store.locate()).shapes
    return not any(name.startswith("opt_state/") for name in stored)


def _restore_weights(
    make: Callable[[], TrainState],
    layout: layouts.Layout,
    abstract: TrainState,
    store: Store,
) -> TrainState:
    """Returns imported weights, with the rest of a new run's state."""
    abstract_weights = {
        "params": abstract.params,
        "router_state": abstract.router_state,
    }
    weights, _, _ = store.restore(abstract_weights)

    def rest() -> tuple[jax.Array, Any]:  # the weights it makes aren't returned
        state = make()
        return state.step, state.opt_state

    step, opt_state = layouts.born(layout, rest)
    return TrainState(step=step, opt_state=opt_state, **weights)
