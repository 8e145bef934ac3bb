"""Routed experts by a loop over blocks of rows: the backend for CPUs.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, X = 2 F the
gate and up halves, N = T * K rows (a row is one choice of one token), M task, B rows of
a block, R rows of one compiled size. The contract is that of `jmoe.ops.grouped`.

Rows are sorted by expert, and a loop takes one *task* after another: up to a block of
rows of one expert, whose whole chain (gather, three products, activation) runs in the
smallest compiled size that holds them. So padding is small, a task's intermediate
arrays stay in the cache, and an expert's weights are read once. Results are added to
their tokens' rows. The loop is sequential: sums have one order, and results repeat to
the bit. The gate and up activations are stored for the backward pass, in an array for
all N rows, nobody's too; with `remat` they are computed again, which is two ninths more
work and no memory.

A backward pass is one loop, which yields all gradients. With `apart` it is two: the
first yields those of x and the gates and stores that of h, for all N rows; the second
yields the weights'. Neither repeats the other's products: h, where the forward pass
stored none, the first stores.

FP8 is computed here as products of what is left of the operands once quantized. Then
the gate and up activations are stored as FP8 too, and SwiGLU is computed again from
these; a backward pass that computes them again rounds them alike, so that neither
`remat` nor `apart` changes a gradient.

Weights that are kept in fewer bits (`jmoe.ops.stored`) are dequantized in the task, one
expert's at a time.

A decoder's few rows, which nothing is differentiated by, `jmoe.ops.grouped_few` takes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import dot, fp8, grouped_few, stored
from jmoe.ops.row_tasks import (
    BLOCK,
    FEW,
    add_own,
    block_rows,
    cut,
    in_smallest_size,
    over_experts,
    pad,
    pick,
    plan_tasks,
    take,
    write_rows,
    zeros_after,
)
from jmoe.ops.rows import Rows, sort_rows
from jmoe.ops.swiglu import swiglu

Recipe = fp8.Recipe | None

Kept = jax.Array | fp8.Quantized
"""Gate and up activations [N, X], with a recipe in FP8 (`fp8.to_bits`)."""


class BlockResiduals(NamedTuple):
    """What the backward pass is given; it gathers the rest."""

    x_TD: jax.Array  # what was left of it once quantized
    gate_TK: jax.Array
    gate_N: jax.Array
    gate_up_EDX: stored.Weight
    down_EFD: stored.Weight
    like: tuple[jax.Array, jax.Array]  # of the weights, `stored.like`
    rows: Rows
    kept_NX: Kept | None  # gate and up activations; None: to be computed again


def routed_mlp_blocks(
    x_TD: jax.Array,
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    gate_up_ED2F: stored.Weight,
    down_EFD: stored.Weight,
    recipe: Recipe = None,
    rows: int | None = None,
    *,
    is_bound: bool = False,
    remat: bool = False,
    apart: bool = False,
    after: jax.Array | None = None,
) -> jax.Array:
    """Returns [T, D] in x's dtype, summed in float32, as `jmoe.ops.grouped` says."""
    del rows, is_bound  # a loop over those that there are needs no array for more
    del after  # one core computes while nothing travels
    weights = gate_up_ED2F, down_EFD
    return _compute(x_TD, expert_TK, gate_TK, *weights, recipe, remat, apart)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _compute(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD, recipe, remat, apart):
    del remat, apart  # nothing is differentiated, so nothing is stored
    weights = gate_up_ED2F, down_EFD
    if recipe is None and grouped_few.suits(expert_TK.size, *weights):
        return grouped_few.routed_mlp_few(x_TD, expert_TK, gate_TK, *weights)
    few = FEW if len(x_TD) <= BLOCK else ()
    return _run(x_TD, expert_TK, gate_TK, *weights, recipe, stores=False, few=few)[0]


def _forward(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD, recipe, remat, apart):
    del apart
    weights = gate_up_ED2F, down_EFD
    return _run(x_TD, expert_TK, gate_TK, *weights, recipe, stores=not remat, few=())


def _run(
    x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD, recipe, *, stores, few
) -> tuple[jax.Array, BlockResiduals]:
    """Returns the output, and what a backward pass is given.

    Args:
      few: sizes that are compiled besides, as `in_smallest_size` has them.
    """
    left = fp8.roundings(recipe)
    num_experts, mlp_dim = down_EFD.shape[:2]
    block = block_rows(len(x_TD))
    rows = sort_rows(expert_TK, num_experts, spare=block, by_keys=True)
    tasks = plan_tasks(rows.size_E, expert_TK.size, block)
    gate_N = take(gate_TK.reshape(-1), rows.choice_N)
    like = stored.like(gate_up_ED2F), stored.like(down_EFD)
    gate_up_EDX, down_EFD = (
        stored.as_matrices(w, x_TD.dtype) for w in (gate_up_ED2F, down_EFD)
    )
    x_TD = fp8.roundings(fp8.of_tokens(recipe)).activations(x_TD)
    weights = _rounded(recipe, gate_up_EDX), _rounded(recipe, down_EFD)

    def run(i, carry):
        y_TD, h_NX = carry
        start, token_B = tasks.start_M[i], cut(rows.token_N, tasks.start_M[i], block)
        expert = tasks.expert_M[i]
        gate_up_DX, down_FD = (_of_expert(w, expert, x_TD.dtype) for w in weights)

        def chain(size):
            h_RX = _dot(take(x_TD, token_B[:size]), gate_up_DX, 1, 0)
            act_RF = left.activations(swiglu(h_RX))
            gate_R1 = cut(gate_N, start, size)[:, None]
            y_BD = pad(gate_R1 * _dot(act_RF, down_FD, 1, 0), block)
            return pad(h_RX, block) if stores else None, y_BD

        h_BX, y_BD = in_smallest_size(tasks.rows_M[i], block, chain, few)
        if stores:
            # What h_BX has beyond the task's own rows, the next task writes over.
            h_NX = write_rows(h_NX, h_BX, start)
        return add_own(y_TD, token_B, y_BD, tasks.rows_M[i]), h_NX

    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    shape = (rows.token_N.size, 2 * mlp_dim)
    h_NX = zeros_after(x_TD, shape, x_TD.dtype) if stores else None
    y_TD, h_NX = lax.fori_loop(0, tasks.count, run, (y_TD, h_NX))
    kept_NX = _keep(recipe, h_NX) if stores else None
    weights = gate_up_EDX, down_EFD
    saved = BlockResiduals(x_TD, gate_TK, gate_N, *weights, like, rows, kept_NX)
    return y_TD.astype(x_TD.dtype), saved


def _backward(recipe: Recipe, remat: bool, apart: bool, saved: BlockResiduals, dy_TD):
    del remat
    gradients = _in_two_loops if apart else _in_one_loop
    return gradients(recipe, saved, dy_TD)


_compute.defvjp(_forward, _backward)


def _in_one_loop(recipe: Recipe, saved: BlockResiduals, dy_TD):
    x_TD, gate_TK, gate_N, gate_up_EDX, down_EFD, _, rows, kept_NX = saved
    h_NX = _read(kept_NX, x_TD.dtype)
    weights = _rounded(recipe, saved.gate_up_EDX), _rounded(recipe, saved.down_EFD)
    block = block_rows(len(x_TD))

    def run(expert, start, own, carry, write):
        dx_TD, d_gate_N, d_gate_up_EDX, d_down_EFD = carry
        choice_B, token_B = (cut(x, start, block) for x in rows[:2])
        gate_up_DX, down_FD = (_of_expert(w, expert, x_TD.dtype) for w in weights)

        def chain(size):
            x_RD = take(x_TD, token_B[:size])
            own_R1 = (jnp.arange(size) < own)[:, None]
            dy_RD = take(dy_TD, token_B[:size])
            h_RX, _ = _hidden(recipe, h_NX, start, x_RD, gate_up_DX)
            gate_R1 = _own_gates(gate_N, start, own_R1, x_RD.dtype)
            act_RF, d_h_RX, d_gate_R = _through_mlp(
                recipe, h_RX, gate_R1, dy_RD, down_FD
            )
            return (
                pad(_input_gradient(recipe, d_h_RX, gate_up_DX), block),
                pad(d_gate_R, block),
                _outer(recipe, own_R1, x_RD, d_h_RX),
                _outer(recipe, own_R1, act_RF * gate_R1, dy_RD),
            )

        dx_BD, d_gate_B, d_gate_up_DX, d_down_FD = in_smallest_size(own, block, chain)
        return (
            add_own(dx_TD, token_B, dx_BD, own),
            add_own(d_gate_N, choice_B, d_gate_B, own),
            write(d_gate_up_EDX, expert, d_gate_up_DX),
            write(d_down_EFD, expert, d_down_FD),
        )

    carry = (
        jnp.zeros(x_TD.shape, jnp.float32),
        jnp.zeros(gate_TK.size, jnp.float32),
        zeros_after(dy_TD, gate_up_EDX.shape, jnp.float32),
        zeros_after(dy_TD, down_EFD.shape, jnp.float32),
    )
    return _gradients(saved, *over_experts(run, rows.size_E, gate_TK.shape, carry))


def _in_two_loops(recipe: Recipe, saved: BlockResiduals, dy_TD):
    dx_TD, d_gate_N, kept_NX, d_h_NX = _input_gradients(recipe, saved, dy_TD)
    d_weights = _weight_gradients(recipe, saved, kept_NX, d_h_NX, dy_TD)
    return _gradients(saved, dx_TD, d_gate_N, *d_weights)


def _input_gradients(recipe: Recipe, saved: BlockResiduals, dy_TD):
    """Returns gradients of x and the gates; h as it is kept; and h's gradient."""
    x_TD, gate_TK, gate_N, gate_up_EDX, _, _, rows, kept_NX = saved
    h_NX = _read(kept_NX, x_TD.dtype)
    weights = _rounded(recipe, saved.gate_up_EDX), _rounded(recipe, saved.down_EFD)
    block = block_rows(len(x_TD))
    tasks = plan_tasks(rows.size_E, gate_TK.size, block)
    stores = kept_NX is not None

    def run(i, carry):
        dx_TD, d_gate_N, *made_NX = carry
        start, own = tasks.start_M[i], tasks.rows_M[i]
        choice_B, token_B = (cut(x, start, block) for x in rows[:2])
        expert = tasks.expert_M[i]
        gate_up_DX, down_FD = (_of_expert(w, expert, x_TD.dtype) for w in weights)

        def chain(size):
            x_RD, dy_RD = (take(x, token_B[:size]) for x in (x_TD, dy_TD))
            h_RX, made_RX = _hidden(recipe, h_NX, start, x_RD, gate_up_DX)
            gate_R1 = cut(gate_N, start, size)[:, None].astype(dy_RD.dtype)
            _, d_h_RX, d_gate_R = _through_mlp(recipe, h_RX, gate_R1, dy_RD, down_FD)
            dx_RD = _input_gradient(recipe, d_h_RX, gate_up_DX)
            made = (d_h_RX,) if stores else (made_RX, d_h_RX)
            return tuple(pad(x, block) for x in (dx_RD, d_gate_R, *made))

        dx_BD, d_gate_B, *made_BX = in_smallest_size(own, block, chain)
        return (
            add_own(dx_TD, token_B, dx_BD, own),
            add_own(d_gate_N, choice_B, d_gate_B, own),
            # As in the forward pass, the next task writes over what isn't its own.
            *(
                write_rows(x_NX, x_BX, start)
                for x_NX, x_BX in zip(made_NX, made_BX, strict=True)
            ),
        )

    shape = (rows.token_N.size, gate_up_EDX.shape[-1])
    carry = (
        jnp.zeros(x_TD.shape, jnp.float32),
        jnp.zeros(gate_TK.size, jnp.float32),
        *[zeros_after(dy_TD, shape, dy_TD.dtype) for _ in range(1 if stores else 2)],
    )
    dx_TD, d_gate_N, *made_NX, d_h_NX = lax.fori_loop(0, tasks.count, run, carry)
    kept_NX = kept_NX if stores else _keep(recipe, *made_NX)
    return dx_TD, d_gate_N, kept_NX, d_h_NX


def _weight_gradients(
    recipe: Recipe, saved: BlockResiduals, kept_NX: Kept, d_h_NX, dy_TD
):
    h_NX: Any = _read(kept_NX, dy_TD.dtype)
    activations = fp8.roundings(recipe).activations
    x_TD, gate_TK, gate_N, gate_up_EDX, down_EFD, _, rows, _ = saved
    block = block_rows(len(x_TD))

    def run(expert, start, own, carry, write):
        d_gate_up_EDX, d_down_EFD = carry
        token_B = cut(rows.token_N, start, block)

        def chain(size):
            own_R1 = (jnp.arange(size) < own)[:, None]  # the rest, the next expert owns
            x_RD, dy_RD = (take(x, token_B[:size]) for x in (x_TD, dy_TD))
            gate_R1 = _own_gates(gate_N, start, own_R1, x_RD.dtype)
            h_RX = cut(h_NX, start, size)
            act_RF = activations(swiglu(h_RX))
            d_h_RX = jnp.where(own_R1, cut(d_h_NX, start, size), 0)
            return (
                _outer(recipe, own_R1, x_RD, d_h_RX),
                _outer(recipe, own_R1, act_RF * gate_R1, dy_RD),
            )

        d_gate_up_DX, d_down_FD = in_smallest_size(own, block, chain)
        return (
            write(d_gate_up_EDX, expert, d_gate_up_DX),
            write(d_down_EFD, expert, d_down_FD),
        )

    carry = (
        zeros_after(d_h_NX, gate_up_EDX.shape, jnp.float32),
        zeros_after(d_h_NX, down_EFD.shape, jnp.float32),
    )
    return over_experts(run, rows.size_E, gate_TK.shape, carry)


def _gradients(saved: BlockResiduals, dx_TD, d_gate_N, d_gate_up_EDX, d_down_EFD):
    """Returns gradients of x, (no) choices, gates and weights, for `jax.custom_vjp`."""
    num_experts, mlp_dim, hidden_dim = saved.down_EFD.shape
    of_gate_up, of_down = saved.like
    d_gate_up_ED2F = d_gate_up_EDX.reshape(num_experts, hidden_dim, 2, mlp_dim)
    return (
        dx_TD.astype(saved.x_TD.dtype),
        None,
        d_gate_N.reshape(saved.gate_TK.shape).astype(saved.gate_TK.dtype),
        d_gate_up_ED2F.astype(of_gate_up.dtype),
        d_down_EFD.astype(of_down.dtype),
    )


def _rounded(recipe: Recipe, w_EIO: stored.Weight) -> stored.Weight:
    """Returns weights as FP8 leaves them; those stored in fewer bits, as they are."""
    if isinstance(w_EIO, stored.FewerBits):
        return w_EIO
    return fp8.roundings(recipe).weights(w_EIO)


def _of_expert(w_EIO: stored.Weight, expert: jax.Array, dtype: Any) -> jax.Array:
    return stored.as_array(jax.tree.map(lambda x: pick(x, expert), w_EIO), dtype)


def _keep(recipe: Recipe, h_NX: jax.Array) -> Kept:
    return h_NX if recipe is None else fp8.to_bits(recipe.quantize(h_NX, fp8.ROW))


def _read(kept_NX: Kept | None, dtype: Any) -> jax.Array | None:
    """Returns all rows: in a task, each use of some would convert them again."""
    if isinstance(kept_NX, fp8.Quantized):
        return fp8.dequantize(fp8.from_bits(kept_NX), dtype)
    return kept_NX


def _hidden(recipe: Recipe, h_NX: jax.Array | None, start, x_RD, gate_up_DX):
    """Returns the gate and up activations of R rows: as they are kept; to be kept."""
    if h_NX is not None:
        h_RX = cut(h_NX, start, x_RD.shape[0])
        return h_RX, h_RX
    h_RX = _dot(x_RD, gate_up_DX, 1, 0)
    return h_RX if recipe is None else recipe.round(h_RX, fp8.ROW), h_RX


def _through_mlp(recipe: Recipe, h_RX, gate_R1, dy_RD, down_FD):
    """Returns activations as they were multiplied; gradients of h and of the gates."""
    act_RF, pull = jax.vjp(swiglu, h_RX)
    act_RF = fp8.roundings(recipe).activations(act_RF)
    d_act_RF = _input_gradient(recipe, dy_RD, down_FD)
    # <dy, act @ down> is <dy @ down.T, act>: no need of the stored output.
    d_gate_R = (d_act_RF * act_RF).astype(jnp.float32).sum(-1)
    (d_h_RX,) = pull(d_act_RF * gate_R1)
    return act_RF, d_h_RX, d_gate_R


def _input_gradient(recipe: Recipe, dy_RO, w_IO):
    return _dot(fp8.roundings(recipe).gradients(dy_RO), w_IO, 1, 1)


def _own_gates(gate_N, start, own_R1, dtype: Any) -> jax.Array:
    """Returns gates [R, 1], zero for rows of another task: so are their gradients."""
    gate_R1 = cut(gate_N, start, len(own_R1))[:, None]
    return jnp.where(own_R1, gate_R1, 0).astype(dtype)


def _outer(recipe: Recipe, own_R1, x_RI, dy_RO):
    """Returns the sum of the rows' outer products, float32, to add to other tasks'.

    x or dy is zero in rows that aren't own.
    """
    if recipe is not None:  # the others don't take part in the scales either
        x_RI, dy_RO = (jnp.where(own_R1, x, 0) for x in (x_RI, dy_RO))
        x_RI = recipe.round(x_RI, fp8.transposed(recipe.activations))
        dy_RO = recipe.round(dy_RO, fp8.transposed(recipe.gradients))
    return dot.outer(x_RI, dy_RO, preferred_element_type=jnp.float32)


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())))
