"""Routed experts: each token through its chosen experts' SwiGLU, weighed and summed.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, 2 SwiGLU's
gate and up halves, N = T * K rows (a row is one choice of one token), M task, B = BLOCK
rows, S rows of one compiled size.

All backends share one signature,

    routed_mlp(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD) -> y_TD
    y_t = sum_k gate_tk * (silu(x_t @ gate_e) * (x_t @ up_e)) @ down_e,  e = expert_tk

are dropless, cost time in proportion to N and not to E, and let gradients flow to x,
the gates and the weights. A token's experts are distinct, except that any number of its
choices may be expert E, "nobody", and contribute nothing: that is how a device skips
the experts that other devices host.

The `blocks` backend is for CPUs. Rows are sorted by expert, and a loop takes one *task*
after another: up to BLOCK rows of one expert, whose whole chain (gather, three
products, activation) runs in the smallest compiled size that holds them. So padding is
small, a task's intermediate arrays stay in the cache, and an expert's weights are read
once. Results are added to their tokens' rows. The loop is sequential: sums have one
order, and results repeat to the bit. `blocks` stores the gate and up activations for
the backward pass, in room for all N rows, nobody's too; `blocks_remat` computes them
again, which is two ninths more work and no room.

The `ragged` backend is for GPUs; see `jmoe.ops.grouped_ragged`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.grouped_ragged import routed_mlp_ragged
from jmoe.ops.rows import sort_rows

BLOCK = 256
STEP = 32  # compiled sizes are STEP, 2 STEP, ... BLOCK rows


class Tasks(NamedTuple):
    """At most M tasks, in the order of rows, of which the first `count` exist."""

    expert_M: jax.Array
    start_M: jax.Array  # first row
    rows_M: jax.Array  # how many, at most BLOCK
    count: jax.Array


def plan_tasks(size_E: jax.Array, num_rows: int, *, skip: int = 0) -> Tasks:
    """Cuts each expert's rows into tasks of at most BLOCK; idle experts get none.

    Args:
      num_rows: at least the sum of `size_E`; decides M.
      skip: how many of each expert's tasks to leave out, from its first.
    """
    tasks_E = jnp.maximum(-(-size_E // BLOCK) - skip, 0)
    end_E = jnp.cumsum(tasks_E)
    index_M = jnp.arange(size_E.shape[0] + num_rows // BLOCK, dtype=jnp.int32)
    expert_M = jnp.searchsorted(end_E, index_M, side="right").astype(jnp.int32)
    expert_M = jnp.minimum(expert_M, size_E.shape[0] - 1)
    nth_M = index_M - (end_E - tasks_E)[expert_M] + skip
    start_M = _first_rows(size_E)[expert_M] + nth_M * BLOCK
    rows_M = jnp.clip(size_E[expert_M] - nth_M * BLOCK, 0, BLOCK)
    return Tasks(expert_M, start_M, rows_M, end_E[-1])


def _first_rows(size_E: jax.Array) -> jax.Array:
    return jnp.cumsum(size_E) - size_E


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed_mlp(
    stores: bool,
    x_TD: jax.Array,
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    gate_up_ED2F: jax.Array,
    down_EFD: jax.Array,
) -> jax.Array:
    """The `blocks` backends of this module's contract; see the module's docstring.

    Args:
      stores: whether the 2 N F gate and up activations are kept for the backward pass,
        which gathers the rest.
      x_TD: tokens; y_TD has their dtype and is summed in float32.
      expert_TK: int32 in [0, E]; E is nobody.
      gate_TK: float32 combine weights.
    """
    return _forward(stores, x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD)[0]


def _forward(stores, x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD):
    num_experts, mlp_dim = down_EFD.shape[:2]
    rows = sort_rows(expert_TK, num_experts, spare=BLOCK)
    tasks = plan_tasks(rows.size_E, expert_TK.size)
    gate_N = _take(gate_TK.reshape(-1), rows.choice_N)
    gate_up_EDX = gate_up_ED2F.reshape(num_experts, -1, 2 * mlp_dim)

    def run(i, carry):
        y_TD, h_NX = carry
        start, token_B = tasks.start_M[i], _cut(rows.token_N, tasks.start_M[i], BLOCK)
        gate_up_DX = _pick(gate_up_EDX, tasks.expert_M[i])
        down_FD = _pick(down_EFD, tasks.expert_M[i])

        def chain(size):
            h_SX = _dot(_take(x_TD, token_B[:size]), gate_up_DX, 1, 0)
            act_SF = jax.nn.silu(h_SX[:, :mlp_dim]) * h_SX[:, mlp_dim:]
            gate_S1 = _cut(gate_N, start, size)[:, None]
            kept_BX = _pad(h_SX) if stores else None
            return kept_BX, _pad(gate_S1 * _dot(act_SF, down_FD, 1, 0))

        h_BX, y_BD = _in_smallest_size(tasks.rows_M[i], chain)
        if stores:
            # What h_BX has beyond the task's own rows, the next task writes over.
            h_NX = lax.dynamic_update_slice_in_dim(h_NX, h_BX, start, 0)
        return _add_own(y_TD, token_B, y_BD, tasks.rows_M[i]), h_NX

    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    room = (rows.token_N.size, 2 * mlp_dim)
    h_NX = _zeros_after(x_TD, room) if stores else None
    y_TD, h_NX = lax.fori_loop(0, tasks.count, run, (y_TD, h_NX))
    saved = (x_TD, gate_TK, gate_N, gate_up_EDX, down_EFD, rows, h_NX)
    return y_TD.astype(x_TD.dtype), saved


def _backward(stores, saved, dy_TD):
    x_TD, gate_TK, gate_N, gate_up_EDX, down_EFD, rows, h_NX = saved
    num_experts, mlp_dim, hidden_dim = down_EFD.shape

    def run(expert, start, own, carry, write):
        dx_TD, d_gate_N, d_gate_up_EDX, d_down_EFD = carry
        choice_B, token_B = (_cut(x, start, BLOCK) for x in rows[:2])
        gate_up_DX, down_FD = _pick(gate_up_EDX, expert), _pick(down_EFD, expert)

        def chain(size):
            x_SD = _take(x_TD, token_B[:size])
            own_S1 = (jnp.arange(size) < own)[:, None]
            dy_SD = jnp.where(own_S1, _take(dy_TD, token_B[:size]), 0)
            if stores:
                h_SX = _cut(h_NX, start, size)
            else:
                h_SX = _dot(x_SD, gate_up_DX, 1, 0)
            gate_S1 = _cut(gate_N, start, size)[:, None].astype(x_SD.dtype)
            act_SF, backward = jax.vjp(_swiglu, h_SX)
            d_act_SF = _dot(dy_SD, down_FD, 1, 1)
            # <dy, act @ down> is <dy @ down.T, act>: no need of the stored output.
            d_gate_S = (d_act_SF * act_SF).astype(jnp.float32).sum(-1)
            (d_h_SX,) = backward(d_act_SF * gate_S1)
            return (
                _pad(_dot(d_h_SX, gate_up_DX, 1, 1)),
                _pad(d_gate_S),
                _dot(x_SD, d_h_SX, 0, 0),
                _dot(act_SF * gate_S1, dy_SD, 0, 0),
            )

        dx_BD, d_gate_B, d_gate_up_DX, d_down_FD = _in_smallest_size(own, chain)
        return (
            _add_own(dx_TD, token_B, dx_BD, own),
            _add_own(d_gate_N, choice_B, d_gate_B, own),
            write(d_gate_up_EDX, expert, d_gate_up_DX),
            write(d_down_EFD, expert, d_down_FD),
        )

    # Most experts have one task: it writes the weights' gradient, without reading it.
    first_E = _first_rows(rows.size_E)
    later = plan_tasks(rows.size_E, gate_TK.size, skip=1)

    def run_first(e, carry):
        return run(e, first_E[e], jnp.minimum(rows.size_E[e], BLOCK), carry, _write)

    def run_later(i, carry):
        return run(
            later.expert_M[i], later.start_M[i], later.rows_M[i], carry, _write_sum
        )

    carry = (
        jnp.zeros(x_TD.shape, jnp.float32),
        jnp.zeros(gate_TK.size, jnp.float32),
        _zeros_after(dy_TD, gate_up_EDX.shape),
        _zeros_after(dy_TD, down_EFD.shape),
    )
    carry = lax.fori_loop(0, num_experts, run_first, carry)
    carry = lax.fori_loop(0, later.count, run_later, carry)
    dx_TD, d_gate_N, d_gate_up_EDX, d_down_EFD = carry
    return (
        dx_TD.astype(x_TD.dtype),
        None,
        d_gate_N.reshape(gate_TK.shape).astype(gate_TK.dtype),
        d_gate_up_EDX.reshape(num_experts, hidden_dim, 2, mlp_dim),
        d_down_EFD,
    )


_routed_mlp.defvjp(_forward, _backward)
routed_mlp_blocks = functools.partial(_routed_mlp, True)
routed_mlp_blocks_remat = functools.partial(_routed_mlp, False)


def _swiglu(h_SX: jax.Array) -> jax.Array:
    gate_SF, up_SF = jnp.split(h_SX, 2, axis=-1)
    return jax.nn.silu(gate_SF) * up_SF


def _zeros_after(x_TD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros of x's dtype that cannot be made before x is.

    XLA makes constant zeros of one shape once, copies them for each layer, and all of
    that at the start of a step, where they stay: as much memory again as the gradients.
    """
    zero = jnp.minimum(jnp.abs(x_TD[0, 0]), 0)
    return jnp.broadcast_to(zero, shape)


def _in_smallest_size(rows: jax.Array, chain: Callable[[int], Any]) -> Any:
    """`chain(size)` for the smallest compiled size of at least `rows` rows."""
    branches = [functools.partial(chain, s) for s in range(STEP, BLOCK + 1, STEP)]
    return lax.switch((rows - 1) // STEP, branches)


def _add_own(
    total: jax.Array, index_B: jax.Array, value: jax.Array, own: jax.Array
) -> jax.Array:
    """Adds the first `own` of the B rows of `value`, to distinct rows of `total`."""
    row_B = jnp.arange(BLOCK)
    nowhere_B = total.shape[0] + row_B  # out of bounds, which scatter drops
    index_B = jnp.where(row_B < own, index_B, nowhere_B)
    value = value.astype(total.dtype)
    return total.at[index_B].add(value, mode="drop", unique_indices=True)


def _write(total_EIO: jax.Array, expert: jax.Array, value_IO: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(total_EIO, value_IO, expert, 0)


def _write_sum(
    total_EIO: jax.Array, expert: jax.Array, value_IO: jax.Array
) -> jax.Array:
    return _write(total_EIO, expert, _pick(total_EIO, expert) + value_IO)


def _pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, BLOCK - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _pick(w: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(w, index, keepdims=False)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())))


BACKENDS = {
    "blocks": routed_mlp_blocks,
    "blocks_remat": routed_mlp_blocks_remat,
    "ragged": routed_mlp_ragged,
}
