"""Routed experts of few rows on CPUs: products as sums, into which XLA fuses the reads.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, X = 2 F the
gate and up halves, N = T * K rows (a row is one choice of one token), I input and O
output dimension of a product, S slice of I, P part of a slice, J input of a part, B =
E * S slices of all matrices, R = S * N slices of all rows. The contract is that of
`jmoe.ops.grouped`, without gradients.

A decoder's step has a row or a few of each expert that it visits, and takes as long as
the weights of these take to be read. To multiply by a slice of an array, XLA for CPUs
copies the slice first, on one core, and multiplies on one core. A sum of products,
written as one expression, it computes in a loop that reads the array itself, on all
cores:

    y[n, p, o] = x[n, p, 0] w[e_n, p, 0, o] + ... + x[n, p, J - 1] w[e_n, p, J - 1, o]

which leaves one number of J, to be summed over p. Rows are sorted by expert, and go
through one slice of their experts' matrices after another: those of one expert follow
each other, and find a slice of it in the core's cache, for which a matrix is too large.
"""

import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jmoe.ops import stored
from jmoe.ops.row_tasks import take
from jmoe.ops.rows import sort_rows
from jmoe.ops.swiglu import swiglu

MAX_ROWS = 192  # of more, blocks of an expert's rows are faster
MAX_TERMS = 16  # J: as many streams as a core reads well
SLICE_PARTS = 4  # P, at least
MIN_PARTS = 16  # S * P: XLA merges the sum over fewer with that over J, and is slow


def suits(num_rows: int, gate_up_ED2F: stored.Weight, down_EFD: stored.Weight) -> bool:
    """Returns whether so many rows are best computed so."""
    weights = gate_up_ED2F, down_EFD
    if num_rows > MAX_ROWS or any(isinstance(w, stored.FewerBits) for w in weights):
        return False
    return all(_num_terms(w.shape[1]) > 1 for w in weights)


def routed_mlp_few(
    x_TD: jax.Array,
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    gate_up_ED2F: stored.Weight,
    down_EFD: stored.Weight,
) -> jax.Array:
    """Returns [T, D] in x's dtype, summed in float32, as `jmoe.ops.grouped` says."""
    num_experts, _, hidden = down_EFD.shape
    rows = sort_rows(expert_TK, num_experts, spare=0, by_keys=True)
    expert_N = take(expert_TK.reshape(-1), rows.choice_N)
    gate_N1 = take(gate_TK.reshape(-1), rows.choice_N)[:, None].astype(jnp.float32)
    is_own_N1 = (expert_N < num_experts)[:, None]
    expert_N = jnp.minimum(expert_N, num_experts - 1)
    gate_up_ED2F, down_EFD = (
        stored.as_array(w, x_TD.dtype) for w in (gate_up_ED2F, down_EFD)
    )
    gate_up_EDX = gate_up_ED2F.reshape(num_experts, hidden, -1)
    h_NX = _dot(take(x_TD, rows.token_N), gate_up_EDX, expert_N)
    y_ND = _dot(swiglu(h_NX), down_EFD, expert_N)
    y_ND = jnp.where(is_own_N1, gate_N1 * y_ND, 0)
    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    y_TD = y_TD.at[rows.token_N].add(y_ND, mode="promise_in_bounds")
    return y_TD.astype(x_TD.dtype)


def _num_terms(inputs: int) -> int:
    """Returns J, the most that leaves enough parts; 1: none does."""
    terms = range(2, min(MAX_TERMS, inputs // MIN_PARTS) + 1)
    return max((j for j in terms if inputs % j == 0), default=1)


def _num_slices(parts: int) -> int:
    """Returns S, the most that leaves enough parts of a slice."""
    most = max(parts // SLICE_PARTS, 1)
    return max(s for s in range(1, most + 1) if parts % s == 0)


def _dot(x_NI: jax.Array, w_EIO: jax.Array, expert_N: jax.Array) -> jax.Array:
    """Returns each row's product with its expert's matrix, [N, O] in x's dtype."""
    num_experts, inputs, outputs = w_EIO.shape
    rows, terms = len(x_NI), _num_terms(inputs)
    slices = _num_slices(inputs // terms)
    w_BPJO = w_EIO.reshape(num_experts * slices, -1, terms, outputs)
    x_RPJ = x_NI.reshape(rows, slices, -1).swapaxes(0, 1)
    x_RPJ = x_RPJ.reshape(slices * rows, -1, terms)
    slice_R = (expert_N * slices + jnp.arange(slices)[:, None]).reshape(-1)

    def term(j: int) -> jax.Array:
        w_RPO = w_BPJO.at[slice_R, :, j].get(mode="promise_in_bounds")
        return x_RPJ[:, :, j, None].astype(jnp.float32) * w_RPO.astype(jnp.float32)

    y_RPO = _sum(map(term, range(terms)))
    y_SNPO = y_RPO.reshape(slices, rows, -1, outputs)
    parts = itertools.product(range(slices), range(y_SNPO.shape[2]))
    return _sum(y_SNPO[s, :, p] for s, p in parts).astype(x_NI.dtype)


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    """Returns what one expression adds; `jnp.sum` wants its terms in an array."""
    return functools.reduce(jnp.add, terms)
