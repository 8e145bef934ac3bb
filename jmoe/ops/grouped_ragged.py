"""Routed experts by grouped matrix products: the backend for Hopper GPUs.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, X = 2 F the
gate and up halves, N row (one choice of one token), M row of a segment; in a product, I
input and O output dimension. The contract is that of `jmoe.ops.grouped`.

Rows are sorted by expert, and one kernel multiplies each expert's rows by its weights.
That needs arrays of a fixed number of rows, though how many rows there are is up to the
router: on a mesh, most of a token's choices are other devices' experts. So rows are
taken in *segments* of about T rows. The first is always computed, which lets the
compiler overlap it with communication; a loop takes as many more as there are. No array
is longer than a segment, and what is nobody's is computed only to fill the last one.

The backward pass computes a segment's activations again from its tokens. So an expert's
MLP stores nothing, and a layer that is recomputed does not run it: only its inputs are
asked for. Results go back to their tokens by gathers, as each choice knows its row;
a scatter would add in any order.

Products are `tokamax`'s kernels when compiled for a GPU in bfloat16. Elsewhere, or
without the `gpu` extra, they are `lax.ragged_dot`, whose cost grows with E.
"""
# pyright: reportMissingImports=false

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.rows import Rows, sort_rows

# What a block of GPU threads works on at a time: rows x outputs, in steps of inputs.
TILE_M, TILE_O, TILE_I = 128, 128, 64
STAGES = 4  # steps whose operands are under way from memory

_HAS_KERNELS = importlib.util.find_spec("tokamax") is not None


def _dimensions(left: int, right: int, *, experts: Sequence[int]) -> Any:
    """Of a product that sums over these two dimensions; rows are the left's first."""
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([left], [right]), ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=experts,
    )


DOT = _dimensions(1, 1, experts=[0])  # MI, EIO -> MO
DOT_TRANSPOSED = _dimensions(1, 2, experts=[0])  # MO, EIO -> MI
OUTER = _dimensions(0, 0, experts=[])  # MI, MO -> EIO


class Plan(NamedTuple):
    """`rows`, with spare ones to whole segments; the row of each choice; those owned.

    Rows from `owned` on are nobody's.
    """

    rows: Rows
    row_TK: jax.Array
    owned: jax.Array


class Segment(NamedTuple):
    """M rows from row `start` on, of which `size_E` are each expert's."""

    start: jax.Array
    choice_M: jax.Array
    token_M: jax.Array
    is_owned_M: jax.Array
    size_E: jax.Array


@jax.custom_vjp
def routed_mlp_ragged(
    x_TD: jax.Array,
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    gate_up_ED2F: jax.Array,
    down_EFD: jax.Array,
) -> jax.Array:
    """The `ragged` backend of `jmoe.ops.grouped`'s contract.

    Args:
      x_TD: tokens; y_TD has their dtype and is summed in float32.
      expert_TK: int32 in [0, E]; E is nobody.
      gate_TK: float32 combine weights.
    """
    return _forward(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD)[0]


def _forward(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD):
    length = _segment_length(x_TD.shape[0])
    plan = _plan(expert_TK, down_EFD.shape[0], length)
    gate_up_EDX = gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1)

    def output(segment):
        x_MD = _spread(x_TD, segment)
        gate_M = gate_TK.reshape(-1)[segment.choice_M]
        y_MD = _mlp(x_MD, gate_M, gate_up_EDX, down_EFD, segment)
        return _collect(y_MD, plan, segment).sum(1)

    y_TD = _over_segments(plan, length, output)
    return y_TD.astype(x_TD.dtype), (x_TD, gate_TK, gate_up_EDX, down_EFD, plan)


def _backward(saved, dy_TD):
    x_TD, gate_TK, gate_up_EDX, down_EFD, plan = saved

    def gradients(segment):
        x_MD = _spread(x_TD, segment)
        gate_M = gate_TK.reshape(-1)[segment.choice_M]
        mlp = functools.partial(_mlp, segment=segment)
        _, pull = jax.vjp(mlp, x_MD, gate_M, gate_up_EDX, down_EFD)
        dx_MD, d_gate_M, *d_weights = pull(_spread(dy_TD, segment))
        dx_TD = _collect(dx_MD, plan, segment).sum(1)
        return dx_TD, _collect(d_gate_M, plan, segment), *d_weights

    length = _segment_length(x_TD.shape[0])
    dx_TD, d_gate_TK, d_gate_up_EDX, d_down_EFD = _over_segments(
        plan, length, gradients
    )
    shape = (*d_gate_up_EDX.shape[:2], 2, -1)
    d_gate_up_ED2F = d_gate_up_EDX.reshape(shape)
    return dx_TD.astype(x_TD.dtype), None, d_gate_TK, d_gate_up_ED2F, d_down_EFD


routed_mlp_ragged.defvjp(_forward, _backward)


def _mlp(x_MD, gate_M, gate_up_EDX, down_EFD, segment):
    """The experts' weighed outputs; rows of nobody hold anything."""
    h_MX = grouped_dot(x_MD, gate_up_EDX, segment.size_E).astype(jnp.float32)
    # Here, so that neither what follows nor its gradient takes in nobody's rows: in the
    # weights' gradients, they count even times zero.
    h_MX = jnp.where(segment.is_owned_M[:, None], h_MX, 0)
    gate_MF, up_MF = jnp.split(h_MX, 2, axis=-1)
    act_MF = jax.nn.silu(gate_MF) * up_MF * gate_M[:, None]
    return grouped_dot(act_MF.astype(x_MD.dtype), down_EFD, segment.size_E)


def _segment_length(tokens: int) -> int:
    return -(-tokens // TILE_M) * TILE_M


def _plan(expert_TK: jax.Array, num_experts: int, length: int) -> Plan:
    spare = -expert_TK.size % length
    rows = sort_rows(expert_TK, num_experts, spare=spare)
    choice_N = rows.choice_N[: expert_TK.size]
    index_N = jnp.arange(expert_TK.size, dtype=jnp.int32)
    row_N = jnp.zeros_like(choice_N).at[choice_N].set(index_N, unique_indices=True)
    return Plan(rows, row_N.reshape(expert_TK.shape), rows.size_E.sum())


def _over_segments(plan: Plan, length: int, compute: Callable[[Segment], Any]) -> Any:
    """The sum of a tree of arrays over all segments that have rows."""
    count = -(-plan.owned // length)

    def add(i, total):
        return jax.tree.map(jnp.add, total, compute(_cut(plan, i, length)))

    first = compute(_cut(plan, 0, length))
    if plan.rows.choice_N.size == length:
        return first
    return lax.fori_loop(1, count, add, first)


def _cut(plan: Plan, index: jax.Array | int, length: int) -> Segment:
    start = jnp.int32(index) * length
    choice_M, token_M = (
        lax.dynamic_slice_in_dim(x, start, length) for x in plan.rows[:2]
    )
    end_E = jnp.cumsum(plan.rows.size_E)
    first_E = end_E - plan.rows.size_E
    within_E = (jnp.clip(x, start, start + length) for x in (first_E, end_E))
    is_owned_M = start + jnp.arange(length) < plan.owned
    first_E, end_E = within_E
    return Segment(start, choice_M, token_M, is_owned_M, end_E - first_E)


def _spread(x_TD: jax.Array, segment: Segment) -> jax.Array:
    """Each row's token; nobody's rows have some token's."""
    return x_TD.at[segment.token_M].get(mode="promise_in_bounds")


def _collect(rows: jax.Array, plan: Plan, segment: Segment) -> jax.Array:
    """Each choice's row of an array [M, ...], float32; zeros where it isn't there."""
    local_TK = plan.row_TK - segment.start
    inside_TK = (local_TK >= 0) & (local_TK < segment.size_E.sum())
    picked = rows.at[jnp.where(inside_TK, local_TK, 0)].get(mode="promise_in_bounds")
    inside = inside_TK.reshape(inside_TK.shape + (1,) * (rows.ndim - 1))
    return jnp.where(inside, picked.astype(jnp.float32), 0)


@jax.custom_vjp
def grouped_dot(x_MI: jax.Array, w_EIO: jax.Array, size_E: jax.Array) -> jax.Array:
    """Each expert's rows times its weights, [M, O] in x's dtype.

    The experts' rows follow each other, `size_E` of them each. What comes after the
    last one's must be finite, and the result has anything there.
    """
    return _product(_dot_kernel, DOT, x_MI, w_EIO, size_E)


def _dot_forward(x_MI, w_EIO, size_E):
    return grouped_dot(x_MI, w_EIO, size_E), (x_MI, w_EIO, size_E)


def _dot_backward(saved, dy_MO):
    x_MI, w_EIO, size_E = saved
    dx_MI = _product(_transposed_kernel, DOT_TRANSPOSED, dy_MO, w_EIO, size_E)
    return dx_MI, _product(_outer_kernel, OUTER, x_MI, dy_MO, size_E), None


grouped_dot.defvjp(_dot_forward, _dot_backward)


def _product(kernel, dimensions, left, right, size_E):
    """By the kernel where it is and is for this dtype; chosen when it is lowered.

    So it can be compiled for a GPU on a machine without one.
    """

    def reference(left, right, size_E):
        return lax.ragged_dot_general(left, right, size_E, dimensions)

    if not _HAS_KERNELS or left.dtype != jnp.bfloat16:
        return reference(left, right, size_E)
    return lax.platform_dependent(left, right, size_E, cuda=kernel, default=reference)


def _dot_kernel(x_MI, w_EIO, size_E):
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu_kernel_sm90 as sm90

    # The kernel leaves out what doesn't fill a step.
    missing = -x_MI.shape[1] % TILE_I
    x_MI = jnp.pad(x_MI, ((0, 0), (0, missing)))
    w_EIO = jnp.pad(w_EIO, ((0, 0), (0, missing), (0, 0)))
    return sm90.ragged_dot_kernel(x_MI, w_EIO, size_E, x_MI.dtype, _tiles())


def _transposed_kernel(dy_MO, w_EIO, size_E):
    return _dot_kernel(dy_MO, w_EIO.mT, size_E)


def _outer_kernel(x_MI, dy_MO, size_E):
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu_kernel_sm90 as sm90

    return sm90.ragged_contracting_dim_dot_kernel(
        x_MI, dy_MO, size_E, x_MI.dtype, _tiles()
    )


def _tiles() -> Any:
    """`tokamax`'s record; given, it need not ask which device is there."""
    from tokamax._src.ops.ragged_dot.pallas_mosaic_gpu_common import Config

    return Config(
        block_m=TILE_M,
        block_n=TILE_O,
        block_k=TILE_I,
        num_stages=STAGES,
        split_k=1,
        persistent=False,
        warp_specialized=False,
    )
