"""Routed experts by grouped matrix products: the backend for Hopper GPUs.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, X = 2 F the
gate and up halves, N row (one choice of one token), M row of a segment; in a product, I
input and O output dimension. The contract is that of `jmoe.ops.grouped`.

Rows are sorted by expert, and one kernel multiplies each expert's rows by its weights.
That needs arrays of a fixed number of rows, though how many rows there are is up to the
router: on a mesh, most of a token's choices are other devices' experts. So rows are
taken in *segments*. The first is always computed, which lets the compiler overlap it
with communication. In `ragged` it has room for the rows of balanced experts, all of
them where no other device has experts, and no less than T. A loop takes as many
segments of T more as there are. No array is longer than a segment, and what is nobody's
is computed only to fill the last one.

The backward pass computes a segment's activations again from its tokens. So an expert's
MLP stores nothing, and a layer that is recomputed does not run it: only its inputs are
asked for. Results go back to their tokens by gathers, as each choice knows its row; a
scatter would add in any order.

In `ragged`, one loop yields all gradients of the segments after the first. In
`ragged_apart`, one yields those of x and the gates, and another the weights', which a
pipeline's schedule puts off. What both need of the first segment is computed once. Of a
later one it is computed in each loop, so that no array need hold it for all: seven
products instead of five. All segments have T rows: in one long segment, XLA puts little
between the start and the end of a collective.

The weights' gradients of all parts of a batch make one sum, in float32 where it is of
several products. A part goes on where another ends, and each product is added in place:
beside the sum there is one product's result, and neither a part's own sum nor a third
array for two to be added up into.

Products are kernels (`jmoe.ops.kernels.grouped`) when compiled for a Hopper GPU in
bfloat16. Elsewhere, or without the `gpu` extra, they are `lax.ragged_dot`, whose cost
grows with E. Weights that are kept in fewer bits are dequantized before, all of a
layer's.

In FP8, weights are quantized once a pass, and rows by each product, whose kernels are
our own (`jmoe.ops.grouped_fp8`). All else is computed as it is without: gates have the
gradients of activations that weren't rounded. In the weights' gradients, a block is
what an expert has of 128 rows of the segment.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import fp8, grouped_fp8, stored
from jmoe.ops.by_platform import by_platform
from jmoe.ops.rows import DOT, DOT_TRANSPOSED, OUTER
from jmoe.ops.segments import (
    Lengths,
    Plan,
    Segment,
    add_later,
    collect,
    cut,
    has_later,
    make_plan,
    over_segments,
    spread,
)

TILE = 128  # rows that a block of GPU threads works on at a time

_DIMENSIONS = {"dot": DOT, "dot_transposed": DOT_TRANSPOSED, "outer": OUTER}

Recipe = fp8.Recipe | None
Weight = jax.Array | fp8.Quantized
Sums = tuple[jax.Array, jax.Array]  # of the gradients of gate_up [E, D, X] and down


class Saved(NamedTuple):
    """What the backward pass is given; it computes the rest again.

    like, summed: no elements, of the weights' dtypes and those that their gradients are
      summed in.
    """

    x_TD: jax.Array
    gate_TK: jax.Array
    gate_up_EDX: Weight
    down_EFD: Weight
    like: tuple[jax.Array, ...]
    summed: tuple[jax.Array, ...]
    plan: Plan


class Middle(NamedTuple):
    """What the gradients of x and of the weights share, of a segment's rows."""

    act_MF: jax.Array  # weighed
    d_h_MX: jax.Array
    d_gate_M: jax.Array


def _forward(parts, weights, recipe, lengths):
    dtype = parts[0][0].dtype
    like = tuple(stored.like(w) for w in weights)
    plans = [make_plan(part[1], weights[1].shape[0], lengths) for part in parts]
    # One product's result is rounded to the weights' dtype by the product.
    several = len(plans) > 1 or has_later(plans[0], lengths)
    wide = jnp.float32 if several else dtype
    summed = tuple(x.astype(jnp.promote_types(wide, x.dtype)) for x in like)
    gate_up_EDX, down_EFD = (_ready(w, dtype, recipe) for w in weights)
    saved = [
        Saved(x_TD, gate_TK, gate_up_EDX, down_EFD, like, summed, plan)
        for (x_TD, _, gate_TK), plan in zip(parts, plans, strict=True)
    ]
    return [_output(recipe, lengths, part) for part in saved], saved


def _output(recipe: Recipe, lengths: Lengths, saved: Saved) -> jax.Array:
    def output(segment):
        act_MF = _activations(*_hidden(recipe, saved, segment), segment)
        y_MD = _dot(recipe, act_MF, saved.down_EFD, segment)
        return collect(y_MD, saved.plan, segment).sum(1)

    y_TD = over_segments(saved.plan, lengths, output)
    return y_TD.astype(saved.x_TD.dtype)


def _backward(recipe: Recipe, lengths: Lengths, saved: Saved, dy_TD, of_weights):
    def add(segment, total):
        of_inputs, of_weights = total
        middle = _middle(recipe, saved, dy_TD, segment)
        own = _input_gradients(recipe, saved, middle, segment)
        return (
            jax.tree.map(jnp.add, of_inputs, own),
            _add_weight_gradients(recipe, saved, dy_TD, middle, segment, of_weights),
        )

    first = cut(saved.plan, 0, lengths.first)
    middle = _middle(recipe, saved, dy_TD, first)
    total = (
        _input_gradients(recipe, saved, middle, first),
        _first_weight_gradients(recipe, saved, dy_TD, middle, first, of_weights),
    )
    return add_later(saved.plan, lengths, add, total)


def _backward_apart(recipe: Recipe, lengths: Lengths, saved: Saved, dy_TD, of_weights):
    plan = saved.plan
    first = cut(plan, 0, lengths.first)

    # What needs only x could be computed long before this pass, and stay.
    of_pass = saved._replace(x_TD=_after(dy_TD, saved.x_TD))
    # As one: else the activations could be left to the weights' gradients to make, of
    # something in float32 that stays until then.
    middle = lax.optimization_barrier(_middle(recipe, of_pass, dy_TD, first))

    def add_inputs(segment, total):
        middle = _middle(recipe, of_pass, dy_TD, segment)
        own = _input_gradients(recipe, of_pass, middle, segment)
        return jax.tree.map(jnp.add, total, own)

    of_first = _input_gradients(recipe, of_pass, middle, first)
    of_inputs = add_later(plan, lengths, add_inputs, of_first)

    later = saved._replace(x_TD=_after(middle.d_h_MX, saved.x_TD))

    def add_weights(segment, total):
        middle = _middle(recipe, later, dy_TD, segment)
        return _add_weight_gradients(recipe, later, dy_TD, middle, segment, total)

    total = _first_weight_gradients(recipe, later, dy_TD, middle, first, of_weights)
    return of_inputs, add_later(plan, lengths, add_weights, total)


def _backend(
    backward: Callable[..., Any],
    lengths_of: Callable[[tuple[int, ...], int], Lengths],
) -> Callable[..., list[jax.Array]]:
    """A `ragged` backend of `jmoe.ops.grouped`'s contract.

    Each y_TD has x's dtype and is summed in float32; the gates are float32.
    """

    def outputs(*operands):
        return _forward(*operands)[0]

    def gradients(recipe, lengths, saved, dy):
        of_parts: list[Any] = []
        of_weights: Any = None
        # The last one's output has its gradient first.
        for part, dy_TD in reversed([*zip(saved, dy, strict=True)]):
            (dx_TD, d_gate_TK), of_weights = backward(
                recipe, lengths, part, dy_TD, of_weights
            )
            of_parts.append((dx_TD.astype(part.x_TD.dtype), None, d_gate_TK))
        return of_parts[::-1], _as_weights(saved[0], of_weights)

    compute: Any = jax.custom_vjp(outputs, nondiff_argnums=(2, 3))
    compute.defvjp(_forward, gradients)

    def routed_mlp(parts, weights, recipe: Recipe = None, hosts: int = 1):
        lengths = lengths_of(parts[0][1].shape, hosts)
        parts = [tuple(part) for part in parts]
        return compute(parts, tuple(weights), recipe, lengths)

    return routed_mlp


def _of_balanced(shape_TK: tuple[int, ...], hosts: int) -> Lengths:
    tokens, top_k = shape_TK
    balanced = -(-tokens * top_k // hosts)
    return Lengths(_whole_tiles(max(tokens, balanced)), _whole_tiles(tokens))


def _of_tokens(shape_TK: tuple[int, ...], hosts: int) -> Lengths:
    del hosts
    length = _whole_tiles(shape_TK[0])
    return Lengths(length, length)


def _whole_tiles(rows: int) -> int:
    return -(-rows // TILE) * TILE


routed_mlp_ragged = _backend(_backward, _of_balanced)
routed_mlp_ragged_apart = _backend(_backward_apart, _of_tokens)


def _ready(w: stored.Weight, dtype: Any, recipe: Recipe) -> Weight:
    """As products take it: matrices [E, I, O] in `dtype`, or quantized."""
    w_EIO = stored.as_matrices(w, dtype)
    if recipe is None:
        return stored.as_array(w_EIO, dtype)
    if isinstance(w_EIO, fp8.Quantized):
        return w_EIO
    return recipe.quantize(stored.as_array(w_EIO, dtype), recipe.weights)


def _hidden(recipe: Recipe, saved: Saved, segment: Segment):
    """The gate and up activations, and the rows' gates."""
    x_MD = spread(saved.x_TD, segment)
    h_MX = _dot(fp8.of_tokens(recipe), x_MD, saved.gate_up_EDX, segment)
    return h_MX, saved.gate_TK.reshape(-1)[segment.choice_M]


def _activations(h_MX: jax.Array, gate_M: jax.Array, segment: Segment) -> jax.Array:
    """Weighed; zeros in nobody's rows."""
    # Masked here, so that neither what follows nor its gradient takes in nobody's rows:
    # in the weights' gradients, they count even times zero.
    is_owned_M1 = segment.is_owned_M[:, None]
    wide_MX = jnp.where(is_owned_M1, h_MX.astype(jnp.float32), 0)
    gate_MF, up_MF = jnp.split(wide_MX, 2, axis=-1)
    return (jax.nn.silu(gate_MF) * up_MF * gate_M[:, None]).astype(h_MX.dtype)


def _middle(recipe: Recipe, saved: Saved, dy_TD: jax.Array, segment: Segment):
    activations = functools.partial(_activations, segment=segment)
    act_MF, pull = jax.vjp(activations, *_hidden(recipe, saved, segment))
    dy_MD = spread(dy_TD, segment)
    return Middle(
        act_MF, *pull(_dot_transposed(recipe, dy_MD, saved.down_EFD, segment))
    )


def _input_gradients(recipe: Recipe, saved: Saved, middle: Middle, segment: Segment):
    """Of x and the gates."""
    dx_MD = _dot_transposed(recipe, middle.d_h_MX, saved.gate_up_EDX, segment)
    dx_TD = collect(dx_MD, saved.plan, segment).sum(1)
    return dx_TD, collect(middle.d_gate_M, saved.plan, segment)


def _first_weight_gradients(
    recipe: Recipe,
    saved: Saved,
    dy_TD: jax.Array,
    middle: Middle,
    segment: Segment,
    total: Sums | None,
) -> Sums:
    """Returns those of a part's first segment, with the `total` of other parts."""
    if total is not None:
        return _add_weight_gradients(recipe, saved, dy_TD, middle, segment, total)
    x_MD, dy_MD = spread(saved.x_TD, segment), spread(dy_TD, segment)
    of_gate_up, of_down = saved.summed
    return (
        _outer(recipe, x_MD, middle.d_h_MX, segment, of_gate_up.dtype),
        _outer(recipe, middle.act_MF, dy_MD, segment, of_down.dtype),
    )


def _add_weight_gradients(
    recipe: Recipe,
    saved: Saved,
    dy_TD: jax.Array,
    middle: Middle,
    segment: Segment,
    total: Sums,
) -> Sums:
    """Returns `total` with a segment's added, of one of the weights after the other."""
    d_gate_up_EDX, d_down_EFD = total
    x_MD, dy_MD = spread(saved.x_TD, segment), spread(dy_TD, segment)
    x_MD = _after(d_gate_up_EDX, x_MD)
    own_EDX = _outer(recipe, x_MD, middle.d_h_MX, segment, d_gate_up_EDX.dtype)
    d_gate_up_EDX = _add_in_place(d_gate_up_EDX, own_EDX)
    act_MF = _after(d_gate_up_EDX, middle.act_MF)
    own_EFD = _outer(recipe, act_MF, dy_MD, segment, d_down_EFD.dtype)
    return d_gate_up_EDX, _add_in_place(d_down_EFD, own_EFD)


def _add_in_place(total_E: jax.Array, x_E: jax.Array) -> jax.Array:
    """Their sum, an expert at a time: of whole arrays XLA would make a third one."""

    def add(e, total_E):
        of_expert = total_E[e] + x_E[e]
        return lax.dynamic_update_index_in_dim(total_E, of_expert, e, 0)

    return lax.fori_loop(0, len(x_E), add, total_E)


def _as_weights(saved: Saved, of_weights: Sums) -> tuple[jax.Array, jax.Array]:
    """In the weights' own shapes and dtypes."""
    d_gate_up_EDX, d_down_EFD = of_weights
    d_gate_up_ED2F = d_gate_up_EDX.reshape(*d_gate_up_EDX.shape[:2], 2, -1)
    of_gate_up, of_down = saved.like
    return d_gate_up_ED2F.astype(of_gate_up.dtype), d_down_EFD.astype(of_down.dtype)


def _after(other: jax.Array, x: jax.Array) -> jax.Array:
    """x, which cannot be read before `other` is there."""
    return lax.optimization_barrier((x, other))[0]


def _dot(recipe: Recipe, x_MI: jax.Array, w_EIO: Any, segment: Segment) -> jax.Array:
    """Each expert's rows times its weights, [M, O] in x's dtype.

    What nobody's rows have must be finite, and the result has anything there.
    """
    if recipe is None:
        return _product("dot", x_MI, w_EIO, segment.size_E)
    x = recipe.quantize(x_MI, recipe.activations)
    return grouped_fp8.dot(x, w_EIO.mT, segment.size_E, x_MI.dtype)


def _dot_transposed(
    recipe: Recipe, dy_MO: jax.Array, w_EIO: Any, segment: Segment
) -> jax.Array:
    """Each expert's rows times its weights' transpose, likewise."""
    if recipe is None:
        return _product("dot_transposed", dy_MO, w_EIO, segment.size_E)
    dy = recipe.quantize(dy_MO, recipe.gradients)
    return grouped_fp8.dot(dy, w_EIO, segment.size_E, dy_MO.dtype)


def _outer(
    recipe: Recipe,
    x_MI: jax.Array,
    dy_MO: jax.Array,
    segment: Segment,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Each expert's sum of its rows' outer products, [E, I, O] in `dtype`.

    One of the operands must be zero in nobody's rows, and the other finite.
    """
    if recipe is None:
        return _product("outer", x_MI, dy_MO, segment.size_E, dtype=dtype)
    return grouped_fp8.outer(x_MI, dy_MO, segment.size_E, recipe, dtype)


def _product(name: str, left, right, size_E, **dtype):
    def kernel(*operands):
        from jmoe.ops.kernels import grouped

        return getattr(grouped, name)(*operands, **dtype)

    def reference(left, right, size_E):
        options = {"preferred_element_type": dtype.get("dtype")}
        dimensions = _DIMENSIONS[name]
        return lax.ragged_dot_general(left, right, size_E, dimensions, **options)

    operands, fits = (left, right, size_E), left.dtype == jnp.bfloat16
    return by_platform(kernel, reference, *operands, fits=fits)
