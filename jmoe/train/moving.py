"""A state's experts from their homes to others, by one program for any moves.

What an optimizer keeps of the experts' weights moves as they do: it lies as they lie
(`jmoe.train.layout`). Arrays are donated, and overwritten in place, one after the
other. Those of one shape, as weights and moments are, share a program.

Shapes: L MoE layer, E expert.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jmoe.balance.homes import Moves, find_moves
from jmoe.config import ModelConfig
from jmoe.nn.model import moe_layers
from jmoe.nn.parameter import EXPERT
from jmoe.parallel import homes
from jmoe.train.layout import (
    WHOLE,
    Layout,
    ParameterAtRest,
    on_mesh,
    parameters_by_path,
    put_whole,
)

Mover = Callable[[Any, np.ndarray, np.ndarray], Any]
"""`move(state, home_LE, new_LE) -> state`; donates the state's experts."""


def make_mover(cfg: ModelConfig, layout: Layout, state: Any) -> Mover:
    """Returns what moves experts from the homes of one array to those of another.

    Args:
      state: or its shapes.

    Raises:
      ValueError: an array of experts hasn't the shape of their weights.
    """
    stored = _of_experts(layout, state)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
    def move(x: jax.Array, moves: Moves, parameter: ParameterAtRest) -> jax.Array:
        is_stacked, axes = parameter.record.is_stacked, _axes(parameter)

        def of_part(x: jax.Array, moves: Moves) -> jax.Array:
            moved = homes.move(x if is_stacked else x[None], moves, axes)
            return moved.reshape(x.shape)

        specs = parameter.spec, WHOLE
        return on_mesh(of_part, layout, specs, parameter.spec)(x, moves)

    def move_state(state: Any, home_LE: np.ndarray, new_LE: np.ndarray) -> Any:
        @functools.cache
        def moves(first: int, last: int, devices: int) -> Any:
            layers = slice(first, last)
            found = find_moves(home_LE[layers], new_LE[layers], devices)
            return put_whole(layout, found)

        def of_array(path: Any, x: Any) -> Any:
            parameter = stored.get(jax.tree_util.keystr(path))
            if parameter is None:
                return x
            devices = math.prod(layout.mesh.shape[axis] for axis in _axes(parameter))
            own = moves(*_layers(parameter, cfg), devices)
            return move(x, own, parameter._replace(path=()))

        return jax.tree.map_with_path(of_array, state)

    return move_state


def _of_experts(layout: Layout, state: Any) -> dict[str, ParameterAtRest]:
    """Returns the weights that experts' arrays of a state are of, by their names."""
    find, found = parameters_by_path(layout), {}
    for path, x in jax.tree.leaves_with_path(state):
        parameter, name = find(path), jax.tree_util.keystr(path)
        if parameter is None or not parameter.record.of_experts:
            continue
        if x.shape == parameter.shape:
            found[name] = parameter
        elif x.size > 1:
            raise ValueError(
                f"train.reassign_every must be 0 with this optimizer: it keeps {name} "
                f"of shape {x.shape} of experts' weights of shape {parameter.shape}. "
                "What has another shape doesn't say what is which expert's."
            )
    return found


def _axes(parameter: ParameterAtRest) -> tuple[str, ...]:
    """Returns the mesh's axes that divide the experts."""
    axes = parameter.spec[parameter.record.dims.index(EXPERT)]
    return (axes,) if isinstance(axes, str) else axes


def _layers(parameter: ParameterAtRest, cfg: ModelConfig) -> tuple[int, int]:
    """Returns the first of the layers that a parameter is of, and where they end."""
    rows = next(
        rows
        for path, rows in moe_layers(cfg).items()
        if parameter.path[: len(path)] == path
    )
    return (rows, rows + 1) if isinstance(rows, int) else (rows.start, rows.stop)
