"""Choices of experts, sorted by expert: the order in which grouped matmuls want them.

Shapes: T token, K choice of a token, N = T * K rows (a row is one choice of one token),
E expert; expert E is "nobody". In a product of all experts, M row, I input and O output
dimension.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def _dimensions(left: int, right: int, *, experts: Sequence[int]) -> Any:
    """Of a `lax.ragged_dot_general` over these two; rows are the left's first."""
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([left], [right]), ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=experts,
    )


DOT = _dimensions(1, 1, experts=[0])  # MI, EIO -> MO
DOT_TRANSPOSED = _dimensions(1, 2, experts=[0])  # MO, EIO -> MI
OUTER = _dimensions(0, 0, experts=[])  # MI, MO -> EIO


class Rows(NamedTuple):
    """Choices sorted by expert; "nobody" comes last, then spare rows of token 0.

    choice_N: the row's choice, an index into a flattened TK. token_N: its token.
    size_E: rows of each expert.
    """

    choice_N: jax.Array
    token_N: jax.Array
    size_E: jax.Array


def sort_rows(expert_TK: jax.Array, num_experts: int, *, spare: int) -> Rows:
    """An expert's rows keep the order of their tokens; `spare` rows are added."""
    expert_N = expert_TK.reshape(-1).astype(jnp.int32)
    choice_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    choice_N = jnp.pad(choice_N, (0, spare))
    size_E = (expert_N[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    return Rows(choice_N, choice_N // expert_TK.shape[1], size_E)
