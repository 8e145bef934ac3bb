"""Routed experts of one part of a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jmoe.ops import grouped


@functools.cache
def alone(backend: str, **options: Any) -> Callable[..., jax.Array]:
    """A backend as a function of one part's arrays and of the weights; y_TD."""

    def routed_mlp(x_TD, expert_TK, gate_TK, gate_up, down):
        part = x_TD, expert_TK, gate_TK
        (y_TD,) = grouped.BACKENDS[backend]([part], (gate_up, down), **options)
        return y_TD

    return routed_mlp
