"""Routed experts of few rows on CPUs: products as sums, into which XLA fuses the reads.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, X = 2 F the
gate and up halves, N = T * K rows (a row is one choice of one token), I input and O
output dimension of a product, S slice of I that a turn of the loop takes, J input of a
slice, R rows of all parts of I, B = E * I inputs of all experts. The contract is that
of `jmoe.ops.grouped`, without gradients.

A decoder's step has a few rows of each expert that it visits, and takes as long as the
weights of these take to be read. To multiply by a slice of an array, XLA for CPUs
copies the slice first, on one core. A sum of products, written as one expression, it
computes in a loop that reads the array itself, on all cores:

    y[n, o] += x[n, 0] w[e_n, 0, o] + ... + x[n, J - 1] w[e_n, J - 1, o]

A loop takes one slice of J inputs after another, and adds to y in place. Rows are
sorted by expert: those of one expert follow each other, and find the slice of its
matrix in the core's nearest cache, for which a matrix is too large. Where rows are few,
a turn takes slices of several parts of I, each as rows of its own: so turns are fewer.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import stored
from jmoe.ops.row_tasks import take
from jmoe.ops.rows import sort_rows
from jmoe.ops.swiglu import swiglu

MAX_ROWS = 1800  # of more, blocks of an expert's rows are faster
MAX_ROWS_OF_EXPERT = 28  # on average; likewise
ROWS = 384  # R, at most where there are parts: the fewer, the more turns of the loop
MAX_TERMS = 16  # J: streams that a core reads at a time
CHAINS = 4  # of these, sums that don't wait for each other


def suits(num_rows: int, gate_up_ED2F: stored.Weight, down_EFD: stored.Weight) -> bool:
    """Returns whether so many rows are best computed so.

    Nobody's count too, as they are computed: most are, where other devices have most of
    the experts.
    """
    weights = gate_up_ED2F, down_EFD
    if any(isinstance(w, stored.FewerBits) for w in weights):
        return False
    if num_rows > min(MAX_ROWS, MAX_ROWS_OF_EXPERT * down_EFD.shape[0]):
        return False
    return all(_divisor(w.shape[1], MAX_TERMS) > 1 for w in weights)


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
    y_ND = _dot(swiglu(h_NX.astype(x_TD.dtype)), down_EFD, expert_N)
    y_ND = jnp.where(is_own_N1, gate_N1 * y_ND, 0)
    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    y_TD = y_TD.at[rows.token_N].add(y_ND, mode="promise_in_bounds")
    return y_TD.astype(x_TD.dtype)


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor that is no more than `most`, which is 1 or more."""
    return max(x for x in range(1, most + 1) if number % x == 0)


def _dot(x_NI: jax.Array, w_EIO: jax.Array, expert_N: jax.Array) -> jax.Array:
    """Returns each row's product with its expert's matrix, [N, O] in float32."""
    (num_rows, inputs), outputs = x_NI.shape, w_EIO.shape[2]
    terms = _divisor(inputs, MAX_TERMS)
    slices = inputs // terms
    # In fewer turns than two there is no loop, and XLA merges the sum over parts with
    # that over terms.
    parts = _divisor(slices, max(1, min(ROWS // num_rows, slices // 2)))
    turns, size = slices // parts, inputs // parts
    w_BO = w_EIO.reshape(-1, outputs)
    x_SRJ = x_NI.reshape(num_rows, parts, turns, terms).transpose(2, 1, 0, 3)
    x_SRJ = x_SRJ.reshape(turns, -1, terms)
    first_R = (expert_N * inputs + size * jnp.arange(parts)[:, None]).reshape(-1)

    def add(s: jax.Array, y_RO: jax.Array) -> jax.Array:
        def chain(j: int) -> jax.Array:
            return _sum(map(term, range(j, terms, CHAINS)))

        def term(j: int) -> jax.Array:
            w_RO = take(w_BO, first_R + (s * terms + j))
            return x_SRJ[s, :, j, None].astype(jnp.float32) * w_RO.astype(jnp.float32)

        return y_RO + _sum(map(chain, range(min(CHAINS, terms))))

    y_RO = jnp.zeros((len(first_R), outputs), jnp.float32)
    y_RO = lax.fori_loop(0, turns, add, y_RO)
    return _sum(y_RO.reshape(parts, num_rows, outputs))


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    """Returns what one expression adds; `jnp.sum` wants its terms in an array."""
    return functools.reduce(jnp.add, terms)
