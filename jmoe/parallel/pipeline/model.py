"""What a pipeline runs, and what it returns.

Shapes: M microbatch, R row (a layer of one group that a rank has).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class LayerGroup(NamedTuple):
    """The layers of one kind that this rank has.

    layer: of a layer's weights, its state, a microbatch and the input; returns
    ((output, what the layer adds to the objective), what it measured). weights, state:
    [R, ...]; the state has no gradient. start, count: int [rank, hosted], first row and
    number of layers, by the stages that the ranks host.
    """

    layer: Callable[[Any, Any, Any, Any], tuple[tuple[Any, jax.Array], Any]]
    weights: Any
    state: Any
    start: np.ndarray
    count: np.ndarray


class Model(NamedTuple):
    """A model in pieces.

    enter: of `shared` weights and a microbatch, the first layer's input. leave: of
    these and the last layer's output, (objective, what was measured). groups: in the
    order of the layers; F and B overlap in the last one. microbatches: [M, ...].
    """

    enter: Callable[[Any, Any], jax.Array]
    leave: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
    shared: Any
    groups: Sequence[LayerGroup]
    microbatches: Any


class Result(NamedTuple):
    """What a rank had a part in; zeros where it had none.

    Gradients are float32, of `shared` and of each group's rows, summed over
    microbatches. What each group's rows measured is merged over them (`reductions`).
    What `leave` measured is there for each microbatch, [M, ...].
    """

    shared: Any
    groups: list[Any]
    left: Any
    measured: list[Any]
