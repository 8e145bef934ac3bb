"""Routed experts by a loop over blocks of rows: the backends for CPUs.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, X = 2 F the
gate and up halves, N = T * K rows (a row is one choice of one token), M task, B = BLOCK
rows, S rows of one compiled size. The contract is that of `jmoe.ops.grouped`.

Rows are sorted by expert, and a loop takes one *task* after another: up to BLOCK rows
of one expert, whose whole chain (gather, three products, activation) runs in the
smallest compiled size that holds them. So padding is small, a task's intermediate
arrays stay in the cache, and an expert's weights are read once. Results are added to
their tokens' rows. The loop is sequential: sums have one order, and results repeat to
the bit. `blocks` stores the gate and up activations for the backward pass, in room for
all N rows, nobody's too; `blocks_remat` computes them again, which is two ninths more
work and no room.

A backward pass is one loop, which yields all gradients. With `blocks_apart` and
`blocks_remat_apart` it is two: the first yields those of x and the gates and stores
that of h, in room for all N rows; the second yields the weights'. So nothing that x's
gradient needs waits for the weights', which a pipeline's schedule puts off. Neither
repeats the other's products: h, where the forward pass stored none, the first stores.

FP8 is computed here as products of what is left of the operands once quantized.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import fp8
from jmoe.ops.rows import Rows, sort_rows

Recipe = fp8.Recipe | None
RoutedMLP = Callable[..., jax.Array]

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


class Saved(NamedTuple):
    """What the backward pass is given; it gathers the rest."""

    x_TD: jax.Array  # what was left of it once quantized
    gate_TK: jax.Array
    gate_N: jax.Array
    gate_up_EDX: jax.Array
    down_EFD: jax.Array
    rows: Rows
    h_NX: jax.Array | None  # None: to be computed again


def _forward(stores, x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD, recipe):
    left = fp8.roundings(recipe)
    num_experts, mlp_dim = down_EFD.shape[:2]
    rows = sort_rows(expert_TK, num_experts, spare=BLOCK)
    tasks = plan_tasks(rows.size_E, expert_TK.size)
    gate_N = _take(gate_TK.reshape(-1), rows.choice_N)
    gate_up_EDX = gate_up_ED2F.reshape(num_experts, -1, 2 * mlp_dim)
    x_TD = left.activations(x_TD)
    left_weights = left.weights(gate_up_EDX), left.weights(down_EFD)

    def run(i, carry):
        y_TD, h_NX = carry
        start, token_B = tasks.start_M[i], _cut(rows.token_N, tasks.start_M[i], BLOCK)
        gate_up_DX, down_FD = (_pick(w, tasks.expert_M[i]) for w in left_weights)

        def chain(size):
            h_SX = _dot(_take(x_TD, token_B[:size]), gate_up_DX, 1, 0)
            act_SF = left.activations(_swiglu(h_SX))
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
    saved = Saved(x_TD, gate_TK, gate_N, gate_up_EDX, down_EFD, rows, h_NX)
    return y_TD.astype(x_TD.dtype), saved


def _backward(recipe: Recipe, saved: Saved, dy_TD):
    x_TD, gate_TK, gate_N, gate_up_EDX, down_EFD, rows, h_NX = saved
    left_weights = _left_weights(recipe, saved)

    def run(expert, start, own, carry, write):
        dx_TD, d_gate_N, d_gate_up_EDX, d_down_EFD = carry
        choice_B, token_B = (_cut(x, start, BLOCK) for x in rows[:2])
        gate_up_DX, down_FD = (_pick(w, expert) for w in left_weights)

        def chain(size):
            x_SD = _take(x_TD, token_B[:size])
            own_S1 = (jnp.arange(size) < own)[:, None]
            dy_SD = jnp.where(own_S1, _take(dy_TD, token_B[:size]), 0)
            h_SX = _hidden(h_NX, start, x_SD, gate_up_DX)
            gate_S1 = _cut(gate_N, start, size)[:, None].astype(x_SD.dtype)
            act_SF, d_h_SX, d_gate_S = _through_mlp(
                recipe, h_SX, gate_S1, dy_SD, down_FD
            )
            return (
                _pad(_input_gradient(recipe, d_h_SX, gate_up_DX)),
                _pad(d_gate_S),
                _outer(recipe, own_S1, x_SD, d_h_SX),
                _outer(recipe, own_S1, act_SF * gate_S1, dy_SD),
            )

        dx_BD, d_gate_B, d_gate_up_DX, d_down_FD = _in_smallest_size(own, chain)
        return (
            _add_own(dx_TD, token_B, dx_BD, own),
            _add_own(d_gate_N, choice_B, d_gate_B, own),
            write(d_gate_up_EDX, expert, d_gate_up_DX),
            write(d_down_EFD, expert, d_down_FD),
        )

    carry = (
        jnp.zeros(x_TD.shape, jnp.float32),
        jnp.zeros(gate_TK.size, jnp.float32),
        _zeros_after(dy_TD, gate_up_EDX.shape),
        _zeros_after(dy_TD, down_EFD.shape),
    )
    return _gradients(saved, *_over_experts(run, rows.size_E, gate_TK.size, carry))


def _backward_apart(recipe: Recipe, saved: Saved, dy_TD):
    dx_TD, d_gate_N, h_NX, d_h_NX = _input_gradients(recipe, saved, dy_TD)
    d_weights = _weight_gradients(recipe, saved, h_NX, d_h_NX, dy_TD)
    return _gradients(saved, dx_TD, d_gate_N, *d_weights)


def _input_gradients(recipe: Recipe, saved: Saved, dy_TD):
    """Of x and the gates; h, and its gradient."""
    x_TD, gate_TK, gate_N, gate_up_EDX, _, rows, h_NX = saved
    left_weights = _left_weights(recipe, saved)
    tasks = plan_tasks(rows.size_E, gate_TK.size)

    def run(i, carry):
        dx_TD, d_gate_N, *made_NX = carry
        start, own = tasks.start_M[i], tasks.rows_M[i]
        choice_B, token_B = (_cut(x, start, BLOCK) for x in rows[:2])
        gate_up_DX, down_FD = (_pick(w, tasks.expert_M[i]) for w in left_weights)

        def chain(size):
            x_SD, dy_SD = (_take(x, token_B[:size]) for x in (x_TD, dy_TD))
            h_SX = _hidden(h_NX, start, x_SD, gate_up_DX)
            gate_S1 = _cut(gate_N, start, size)[:, None].astype(dy_SD.dtype)
            _, d_h_SX, d_gate_S = _through_mlp(recipe, h_SX, gate_S1, dy_SD, down_FD)
            made_SX = (h_SX, d_h_SX)[-len(made_NX) :]  # h only if it wasn't stored
            dx_SD = _input_gradient(recipe, d_h_SX, gate_up_DX)
            return tuple(map(_pad, (dx_SD, d_gate_S, *made_SX)))

        dx_BD, d_gate_B, *made_BX = _in_smallest_size(own, chain)
        return (
            _add_own(dx_TD, token_B, dx_BD, own),
            _add_own(d_gate_N, choice_B, d_gate_B, own),
            # As in the forward pass, the next task writes over what isn't its own.
            *(
                lax.dynamic_update_slice_in_dim(x_NX, x_BX, start, 0)
                for x_NX, x_BX in zip(made_NX, made_BX, strict=True)
            ),
        )

    room = _zeros_after(dy_TD, (rows.token_N.size, gate_up_EDX.shape[-1]))
    carry = (
        jnp.zeros(x_TD.shape, jnp.float32),
        jnp.zeros(gate_TK.size, jnp.float32),
        *([room, room] if h_NX is None else [room]),
    )
    dx_TD, d_gate_N, *made_NX = lax.fori_loop(0, tasks.count, run, carry)
    h_NX, d_h_NX = made_NX if h_NX is None else (h_NX, *made_NX)
    return dx_TD, d_gate_N, h_NX, d_h_NX


def _weight_gradients(recipe: Recipe, saved: Saved, h_NX, d_h_NX, dy_TD):
    activations = fp8.roundings(recipe).activations
    x_TD, gate_TK, gate_N, gate_up_EDX, down_EFD, rows, _ = saved

    def run(expert, start, own, carry, write):
        d_gate_up_EDX, d_down_EFD = carry
        token_B = _cut(rows.token_N, start, BLOCK)

        def chain(size):
            own_S1 = (jnp.arange(size) < own)[:, None]  # the rest, the next expert owns
            x_SD, dy_SD = (_take(x, token_B[:size]) for x in (x_TD, dy_TD))
            gate_S1 = _cut(gate_N, start, size)[:, None].astype(x_SD.dtype)
            act_SF = activations(_swiglu(_cut(h_NX, start, size)))
            d_h_SX = jnp.where(own_S1, _cut(d_h_NX, start, size), 0)
            dy_SD = jnp.where(own_S1, dy_SD, 0)
            return (
                _outer(recipe, own_S1, x_SD, d_h_SX),
                _outer(recipe, own_S1, act_SF * gate_S1, dy_SD),
            )

        d_gate_up_DX, d_down_FD = _in_smallest_size(own, chain)
        return (
            write(d_gate_up_EDX, expert, d_gate_up_DX),
            write(d_down_EFD, expert, d_down_FD),
        )

    carry = (
        _zeros_after(d_h_NX, gate_up_EDX.shape),
        _zeros_after(d_h_NX, down_EFD.shape),
    )
    return _over_experts(run, rows.size_E, gate_TK.size, carry)


def _gradients(saved: Saved, dx_TD, d_gate_N, d_gate_up_EDX, d_down_EFD):
    """As `jax.custom_vjp` wants them: of x, the choices, the gates and the weights."""
    num_experts, mlp_dim, hidden_dim = saved.down_EFD.shape
    return (
        dx_TD.astype(saved.x_TD.dtype),
        None,
        d_gate_N.reshape(saved.gate_TK.shape).astype(saved.gate_TK.dtype),
        d_gate_up_EDX.reshape(num_experts, hidden_dim, 2, mlp_dim),
        d_down_EFD,
    )


def _left_weights(recipe: Recipe, saved: Saved) -> tuple[jax.Array, jax.Array]:
    left = fp8.roundings(recipe)
    return left.weights(saved.gate_up_EDX), left.weights(saved.down_EFD)


def _hidden(h_NX, start, x_SD, gate_up_DX):
    """The gate and up activations of S rows, as stored or computed again."""
    if h_NX is None:
        return _dot(x_SD, gate_up_DX, 1, 0)
    return _cut(h_NX, start, x_SD.shape[0])


def _through_mlp(recipe: Recipe, h_SX, gate_S1, dy_SD, down_FD):
    """Activations, as they were multiplied; gradients of h and of the gates."""
    act_SF, pull = jax.vjp(_swiglu, h_SX)
    act_SF = fp8.roundings(recipe).activations(act_SF)
    d_act_SF = _input_gradient(recipe, dy_SD, down_FD)
    # <dy, act @ down> is <dy @ down.T, act>: no need of the stored output.
    d_gate_S = (d_act_SF * act_SF).astype(jnp.float32).sum(-1)
    (d_h_SX,) = pull(d_act_SF * gate_S1)
    return act_SF, d_h_SX, d_gate_S


def _input_gradient(recipe: Recipe, dy_SO, w_IO):
    return _dot(fp8.roundings(recipe).gradients(dy_SO), w_IO, 1, 1)


def _outer(recipe: Recipe, own_S1, x_SI, dy_SO):
    """The sum of the rows' outer products; dy is zero in rows that aren't own ones."""
    left = fp8.roundings(recipe)
    if recipe is not None:
        x_SI = jnp.where(own_S1, x_SI, 0)  # others don't take part in the scales
    return _dot(left.activations(x_SI.T).T, left.gradients(dy_SO.T).T, 0, 0)


def _over_experts(run, size_E: jax.Array, num_rows: int, carry):
    """`run(expert, start, own, carry, write)` for all tasks, each expert's first first.

    Most experts have one task: it writes the weights' gradient, without reading it.
    """
    first_E = _first_rows(size_E)
    later = plan_tasks(size_E, num_rows, skip=1)

    def run_first(e, carry):
        return run(e, first_E[e], jnp.minimum(size_E[e], BLOCK), carry, _write)

    def run_later(i, carry):
        return run(
            later.expert_M[i], later.start_M[i], later.rows_M[i], carry, _write_sum
        )

    carry = lax.fori_loop(0, size_E.shape[0], run_first, carry)
    return lax.fori_loop(0, later.count, run_later, carry)


def _backend(stores: bool, backward: Callable[..., Any]) -> RoutedMLP:
    """A `blocks` backend of this module's contract.

    Its y_TD has x's dtype and is summed in float32; the gates are float32.

    Args:
      stores: whether the 2 N F gate and up activations are kept for the backward pass.
      backward: `_backward` or `_backward_apart`.
    """

    forward = functools.partial(_forward, stores)

    def output(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD, recipe: Recipe = None):
        return forward(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD, recipe)[0]

    routed_mlp: Any = jax.custom_vjp(output, nondiff_argnums=(5,))
    routed_mlp.defvjp(forward, backward)
    return routed_mlp


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


routed_mlp_blocks = _backend(True, _backward)
routed_mlp_blocks_remat = _backend(False, _backward)
routed_mlp_blocks_apart = _backend(True, _backward_apart)
routed_mlp_blocks_remat_apart = _backend(False, _backward_apart)
