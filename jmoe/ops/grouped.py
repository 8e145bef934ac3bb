"""Routed experts: each token through its chosen experts' SwiGLU, and summed.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, 2 SwiGLU's
gate and up halves, N = T * K rows (a row is one choice of one token), M task.

All backends share one signature,

    routed_mlp(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD) -> y_TD
    y_t = sum_k gate_tk * (silu(x_t @ gate_e) * (x_t @ up_e)) @ down_e,  e = expert_tk

are dropless, cost time in proportion to N and not to E, and let gradients flow to x,
the gates and the weights. A choice of expert E ("nobody") contributes nothing: that is
how a device skips the experts that other devices host.

The `blocks` backend is for CPUs. Rows are sorted by expert, and a loop takes one *task*
after another: up to BLOCK rows of one expert, multiplied in the smallest of a few
compiled sizes that holds them, so little is wasted on padding. Each product writes a
whole BLOCK; what it writes beyond its own rows, the next task writes over, and so rows
need no gaps between experts. Rows carry BLOCK spare places at the end for the last one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 256
STEP = 32  # compiled sizes are STEP, 2 STEP, ... BLOCK rows


class Rows(NamedTuple):
    """Every choice's place when choices are sorted by expert.

    token_N: the row's token, with BLOCK spare rows. row_TK: the choice's row.
    size_E: rows of each expert; choices of "nobody" stand behind all of them.
    """

    token_N: jax.Array
    row_TK: jax.Array
    size_E: jax.Array


class Tasks(NamedTuple):
    """At most M tasks, of which the first `count` exist."""

    expert_M: jax.Array
    start_M: jax.Array  # first row
    rows_M: jax.Array  # how many, at most BLOCK
    opens_M: jax.Array  # whether this is its expert's first task
    count: jax.Array


def sort_rows(expert_TK: jax.Array, num_experts: int) -> Rows:
    """Stable: an expert's rows keep the order of their tokens."""
    expert_N = expert_TK.reshape(-1)
    order_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    row_N = jnp.argsort(order_N).astype(jnp.int32)
    size_E = (expert_N[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    token_N = jnp.pad(order_N // expert_TK.shape[1], (0, BLOCK))
    return Rows(token_N, row_N.reshape(expert_TK.shape), size_E)


def plan_tasks(size_E: jax.Array, num_rows: int) -> Tasks:
    """Cuts each expert's rows into tasks of at most BLOCK; idle experts get none."""
    tasks_E = -(-size_E // BLOCK)
    end_E = jnp.cumsum(tasks_E)
    index_M = jnp.arange(size_E.shape[0] + num_rows // BLOCK, dtype=jnp.int32)
    expert_M = jnp.searchsorted(end_E, index_M, side="right").astype(jnp.int32)
    expert_M = jnp.minimum(expert_M, size_E.shape[0] - 1)
    nth_M = index_M - (end_E - tasks_E)[expert_M]
    start_M = (jnp.cumsum(size_E) - size_E)[expert_M] + nth_M * BLOCK
    rows_M = jnp.clip(size_E[expert_M] - nth_M * BLOCK, 0, BLOCK)
    return Tasks(expert_M, start_M, rows_M, nth_M == 0, end_E[-1])


def _in_smallest_size(
    rows: jax.Array, product: Callable[[int], jax.Array]
) -> jax.Array:
    """`product(size)` for the smallest compiled size of at least `rows` rows."""
    branches = [functools.partial(product, s) for s in range(STEP, BLOCK + 1, STEP)]
    return lax.switch((rows - 1) // STEP, branches)


def _per_row(x_NI: jax.Array, w_EIO: jax.Array, tasks: Tasks, side: int) -> jax.Array:
    """`x @ w[expert]` row by row; `side` is w's contracted dimension, 1 or 2."""
    out_dim = w_EIO.shape[3 - side]

    def run(i, out_NO):
        start = tasks.start_M[i]
        x_BI = lax.dynamic_slice_in_dim(x_NI, start, BLOCK)
        w_IO = lax.dynamic_index_in_dim(w_EIO, tasks.expert_M[i], keepdims=False)

        def product(size):
            y = lax.dot_general(x_BI[:size], w_IO, (((1,), (side - 1,)), ((), ())))
            return jnp.pad(y, ((0, BLOCK - size), (0, 0)))

        y_BO = _in_smallest_size(tasks.rows_M[i], product)
        return lax.dynamic_update_slice_in_dim(out_NO, y_BO, start, 0)

    out_NO = jnp.zeros((x_NI.shape[0], out_dim), x_NI.dtype)
    return lax.fori_loop(0, tasks.count, run, out_NO)


def _per_expert(x_NI: jax.Array, y_NO: jax.Array, tasks: Tasks, num_experts: int):
    """`x.T @ y` over each expert's rows, [E, I, O]."""

    def run(i, out_EIO):
        start, expert = tasks.start_M[i], tasks.expert_M[i]
        own_B = jnp.arange(BLOCK) < tasks.rows_M[i]
        x_BI = lax.dynamic_slice_in_dim(x_NI, start, BLOCK)
        y_BO = lax.dynamic_slice_in_dim(y_NO, start, BLOCK)
        y_BO = jnp.where(own_B[:, None], y_BO, 0)
        x_BI = jnp.where(own_B[:, None], x_BI, 0)
        w_IO = _in_smallest_size(tasks.rows_M[i], lambda s: x_BI[:s].T @ y_BO[:s])
        before_IO = lax.dynamic_index_in_dim(out_EIO, expert, keepdims=False)
        w_IO = lax.cond(tasks.opens_M[i], lambda: w_IO, lambda: w_IO + before_IO)
        return lax.dynamic_update_index_in_dim(out_EIO, w_IO, expert, 0)

    shape = (num_experts, x_NI.shape[1], y_NO.shape[1])
    return lax.fori_loop(0, tasks.count, run, jnp.zeros(shape, x_NI.dtype))


@jax.custom_vjp
def routed_mlp_blocks(
    x_TD: jax.Array,
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    gate_up_ED2F: jax.Array,
    down_EFD: jax.Array,
) -> jax.Array:
    """The `blocks` backend of this module's contract; see the module's docstring.

    Args:
      expert_TK: int32 in [0, E]; E is nobody.
      gate_TK: float32 combine weights.

    The backward pass stores gate and up activations (N x 2F) and gathers the rest again.
    """
    return _forward(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD)[0]


def _forward(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD):
    num_experts = down_EFD.shape[0]
    rows = sort_rows(expert_TK, num_experts)
    tasks = plan_tasks(rows.size_E, expert_TK.size)
    someone_TK = expert_TK < num_experts
    gate_TK = jnp.where(someone_TK, gate_TK, 0)
    gate_up_EDX = gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1)

    h_NX = _per_row(_take(x_TD, rows.token_N), gate_up_EDX, tasks, side=1)
    gate_NF, up_NF = jnp.split(h_NX, 2, axis=-1)
    y_ND = _per_row(jax.nn.silu(gate_NF) * up_NF, down_EFD, tasks, side=1)
    y_TD = _combine(y_ND, rows.row_TK, gate_TK)
    return y_TD, (x_TD, someone_TK, gate_TK, gate_up_EDX, down_EFD, rows, tasks, h_NX)


def _backward(saved, dy_TD):
    x_TD, someone_TK, gate_TK, gate_up_EDX, down_EFD, rows, tasks, h_NX = saved
    num_experts = down_EFD.shape[0]
    gate_up, up_NF = jnp.split(h_NX, 2, axis=-1)
    sigmoid_NF = jax.nn.sigmoid(gate_up)
    silu_NF = gate_up * sigmoid_NF
    act_NF = silu_NF * up_NF

    dy_ND = _take(dy_TD, rows.token_N)
    # Every row knows its choice: scatter the gates the way the choices were sorted.
    weight_N = jnp.zeros(rows.token_N.shape, dy_ND.dtype).at[rows.row_TK].set(gate_TK)
    weight_N1 = weight_N[:, None]
    d_act_NF = _per_row(dy_ND, down_EFD, tasks, side=2)
    # <dy, act @ down> is <dy @ down.T, act>: the gates need no stored outputs.
    d_gate_N = (d_act_NF * act_NF).astype(jnp.float32).sum(-1)
    d_act_NF = d_act_NF * weight_N1
    d_h_NX = jnp.concatenate(
        [
            d_act_NF * up_NF * (sigmoid_NF + silu_NF * (1 - sigmoid_NF)),
            d_act_NF * silu_NF,
        ],
        axis=-1,
    )
    d_down_EFD = _per_expert(act_NF * weight_N1, dy_ND, tasks, num_experts)
    x_ND = _take(x_TD, rows.token_N)
    d_gate_up_EDX = _per_expert(x_ND, d_h_NX, tasks, num_experts)
    d_x_ND = _per_row(d_h_NX, gate_up_EDX, tasks, side=2)
    d_x_TD = _combine(d_x_ND, rows.row_TK, someone_TK.astype(d_x_ND.dtype))
    d_gate_TK = jnp.where(someone_TK, _take(d_gate_N, rows.row_TK), 0)
    halves = (*gate_up_EDX.shape[:2], 2, down_EFD.shape[1])
    return d_x_TD, None, d_gate_TK, d_gate_up_EDX.reshape(halves), d_down_EFD


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _combine(y_ND: jax.Array, row_TK: jax.Array, weight_TK: jax.Array) -> jax.Array:
    """Sum over K of each choice's row times its weight, a gather for each k."""
    terms = (
        _take(y_ND, row_TK[:, k]) * weight_TK[:, k, None]
        for k in range(row_TK.shape[1])
    )
    return functools.reduce(jnp.add, terms).astype(y_ND.dtype)


routed_mlp_blocks.defvjp(_forward, _backward)

BACKENDS = {"blocks": routed_mlp_blocks}
