"""Routed experts by grouped matrix products: the backend for Hopper GPUs.

Shapes: T token, K choice of a token, D hidden, E expert, F MLP dimension, X = 2 F the
gate and up halves, N row (one choice of one token), M row of a segment; in a product, I
input and O output dimension. The contract is that of `jmoe.ops.grouped`.

Rows are sorted by expert, and one kernel multiplies each expert's rows by its weights.
That needs arrays of a fixed number of rows, though how many rows there are is up to the
router: on a mesh, most of a token's choices are other devices' experts. So rows are
taken in *segments* (`jmoe.ops.segments`). The first is always computed, which lets the
compiler overlap it with communication. It holds as many rows as are expected, all of
them where no other device has experts. A loop takes as many more as there are. No array
is longer than a segment, and what is nobody's is computed only to fill the last one.

The backward pass computes a segment's activations again from its tokens. So an expert's
MLP stores nothing, and a layer that is recomputed does not run it: only its inputs are
asked for. Results go back to their tokens by gathers: a scatter adds in any order.

One loop yields all gradients of the segments after the first. With `apart`, one yields
those of x and the gates, and another the weights'. What both need of the first segment
is computed once; of a later one in each loop, so that no array need hold it for all:
seven products, not five.

Products are kernels (`jmoe.ops.kernels.grouped`) when compiled for a Hopper GPU in
bfloat16. Elsewhere, or without the `gpu` extra, they are `lax.ragged_dot`, whose cost
grows with E. Weights kept in fewer bits are dequantized before, all of a layer's.

In FP8, weights are quantized once a pass, and rows by each product, whose kernels are
our own (`jmoe.ops.grouped_fp8`). All else is computed as it is without: gates have the
gradients of activations that weren't rounded. In the weights' gradients, a block is
what an expert has of 128 rows of the segment.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import fp8, grouped_fp8, segments, stored
from jmoe.ops.by_platform import by_platform
from jmoe.ops.rows import DOT, DOT_TRANSPOSED, OUTER
from jmoe.ops.segments import Lengths, RowPlan, Segment

_DIMENSIONS = {"dot": DOT, "dot_transposed": DOT_TRANSPOSED, "outer": OUTER}

Recipe = fp8.Recipe | None
Weight = jax.Array | fp8.Quantized


class Residuals(NamedTuple):
    """What the backward pass is given; it computes the rest again.

    like: of the weights, `stored.like`.
    """

    x_TD: jax.Array
    gate_TK: jax.Array
    gate_up_EDX: Weight
    down_EFD: Weight
    like: tuple[jax.Array, jax.Array]
    plan: RowPlan


class Middle(NamedTuple):
    """What the gradients of x and of the weights share, of a segment's rows."""

    act_MF: jax.Array  # weighed
    d_h_MX: jax.Array
    d_gate_M: jax.Array


def routed_mlp_ragged(
    x_TD: jax.Array,
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    gate_up_ED2F: stored.Weight,
    down_EFD: stored.Weight,
    recipe: Recipe = None,
    rows: int | None = None,
    *,
    is_bound: bool = False,
    remat: bool = True,
    apart: bool = False,
    after: jax.Array | None = None,
) -> jax.Array:
    """Returns [T, D] in x's dtype, summed in float32, as `jmoe.ops.grouped` says."""
    del remat  # the backward pass always computes activations again
    lengths = segments.lengths_of(expert_TK.shape, rows, is_bound=is_bound, apart=apart)
    weights = gate_up_ED2F, down_EFD
    return _compute(x_TD, expert_TK, gate_TK, *weights, after, recipe, lengths, apart)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _compute(*operands):
    return _forward(*operands)[0]


def _forward(
    x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD, after, recipe, lengths, apart
):
    del apart
    plan = segments.plan_rows(expert_TK, down_EFD.shape[0], lengths)
    like = stored.like(gate_up_ED2F), stored.like(down_EFD)
    gate_up_EDX, down_EFD = (
        _ready(w, x_TD.dtype, recipe) for w in (gate_up_ED2F, down_EFD)
    )
    saved = Residuals(x_TD, gate_TK, gate_up_EDX, down_EFD, like, plan)
    # A backward pass that computes what it is given again needn't wait.
    waits = saved if after is None else saved._replace(x_TD=_after(after, x_TD))

    def output(segment):
        act_MF = _activations(*_hidden(recipe, waits, segment), segment)
        y_MD = _dot(recipe, act_MF, down_EFD, segment)
        y_TD = segments.collect(y_MD, plan, segment).sum(1)
        return y_TD.astype(lengths.of_sums(x_TD.dtype))

    y_TD = segments.over_segments(plan, lengths, output)
    return y_TD.astype(x_TD.dtype), saved


def _backward(recipe: Recipe, lengths: Lengths, apart: bool, saved: Residuals, dy_TD):
    gradients = _in_two_loops if apart else _in_one_loop
    return gradients(recipe, lengths, saved, dy_TD)


_compute.defvjp(_forward, _backward)


def _in_one_loop(recipe: Recipe, lengths: Lengths, saved: Residuals, dy_TD: jax.Array):
    # What several segments add up is float32, and then rounded once.
    has_later = saved.plan.rows.choice_N.size > lengths.first
    several = has_later and not lengths.are_later_rare
    summed = saved._replace(like=(jnp.zeros(0),) * 2) if several else saved

    def gradients(segment):
        middle = _middle(recipe, saved, dy_TD, segment)
        of_inputs = _input_gradients(recipe, saved, middle, segment, lengths)
        return of_inputs + _weight_gradients(recipe, summed, dy_TD, middle, segment)

    return _results(saved, *segments.over_segments(saved.plan, lengths, gradients))


def _in_two_loops(recipe: Recipe, lengths: Lengths, saved: Residuals, dy_TD):
    plan = saved.plan
    first = segments.cut(plan, 0, lengths.first)

    # What needs only x could be computed long before this pass, and stay.
    of_pass = saved._replace(x_TD=_after(dy_TD, saved.x_TD))
    # As one: else the activations could be left to the weights' gradients to make, of
    # something in float32 that stays until then.
    middle = lax.optimization_barrier(_middle(recipe, of_pass, dy_TD, first))

    def input_gradients(segment):
        middle = _middle(recipe, of_pass, dy_TD, segment)
        return _input_gradients(recipe, of_pass, middle, segment, lengths)

    of_first = _input_gradients(recipe, of_pass, middle, first, lengths)
    of_inputs = segments.add_later(plan, lengths, input_gradients, of_first)

    # An overload's segments add up in the weights' dtype: float32 arrays for what is
    # rare would take room, and the exchanges' place, in every step.
    of_pass = saved._replace(x_TD=_after(middle.d_h_MX, saved.x_TD))

    def weight_gradients(segment):
        middle = _middle(recipe, of_pass, dy_TD, segment)
        return _weight_gradients(recipe, of_pass, dy_TD, middle, segment)

    of_first = _weight_gradients(recipe, of_pass, dy_TD, middle, first)
    of_weights = segments.add_later(plan, lengths, weight_gradients, of_first)
    return _results(saved, *of_inputs, *of_weights)


def _ready(w: stored.Weight, dtype: Any, recipe: Recipe) -> Weight:
    """Returns weights as products take them: [E, I, O] in `dtype`, or quantized."""
    w_EIO = stored.as_matrices(w, dtype)
    if recipe is None:
        return stored.as_array(w_EIO, dtype)
    if isinstance(w_EIO, fp8.Quantized):
        return w_EIO
    return recipe.quantize(stored.as_array(w_EIO, dtype), recipe.weights)


def _hidden(recipe: Recipe, saved: Residuals, segment: Segment):
    """Returns the gate and up activations, and the rows' gates."""
    x_MD = segments.spread(saved.x_TD, segment)
    h_MX = _dot(fp8.of_tokens(recipe), x_MD, saved.gate_up_EDX, segment)
    return h_MX, saved.gate_TK.reshape(-1)[segment.choice_M]


def _activations(h_MX: jax.Array, gate_M: jax.Array, segment: Segment) -> jax.Array:
    """Returns weighed activations; zeros in nobody's rows."""
    # Masked here, so that neither what follows nor its gradient takes in nobody's rows:
    # in the weights' gradients, they count even times zero.
    is_owned_M1 = segment.is_owned_M[:, None]
    wide_MX = jnp.where(is_owned_M1, h_MX.astype(jnp.float32), 0)
    gate_MF, up_MF = jnp.split(wide_MX, 2, axis=-1)
    return (jax.nn.silu(gate_MF) * up_MF * gate_M[:, None]).astype(h_MX.dtype)


def _middle(recipe: Recipe, saved: Residuals, dy_TD: jax.Array, segment: Segment):
    activations = functools.partial(_activations, segment=segment)
    act_MF, pull = jax.vjp(activations, *_hidden(recipe, saved, segment))
    dy_MD = segments.spread(dy_TD, segment)
    return Middle(
        act_MF, *pull(_dot_transposed(recipe, dy_MD, saved.down_EFD, segment))
    )


def _input_gradients(
    recipe: Recipe,
    saved: Residuals,
    middle: Middle,
    segment: Segment,
    lengths: Lengths,
):
    """Returns the gradients of x and the gates."""
    dx_MD = _dot_transposed(recipe, middle.d_h_MX, saved.gate_up_EDX, segment)
    dx_TD = segments.collect(dx_MD, saved.plan, segment).sum(1)
    dx_TD = dx_TD.astype(lengths.of_sums(saved.x_TD.dtype))
    return dx_TD, segments.collect(middle.d_gate_M, saved.plan, segment)


def _weight_gradients(
    recipe: Recipe, saved: Residuals, dy_TD: jax.Array, middle: Middle, segment: Segment
):
    """Returns one segment's gradients, no narrower than the weights are."""
    x_MD, dy_MD = segments.spread(saved.x_TD, segment), segments.spread(dy_TD, segment)
    dtypes = (jnp.promote_types(x_MD.dtype, like.dtype) for like in saved.like)
    outer = functools.partial(_outer, recipe, segment=segment)
    operands = (x_MD, middle.d_h_MX), (middle.act_MF, dy_MD)
    return tuple(outer(*xy, dtype=d) for xy, d in zip(operands, dtypes, strict=True))


def _results(saved: Residuals, dx_TD, d_gate_TK, d_gate_up_EDX, d_down_EFD):
    """Returns gradients of x, (no) choices, gates and weights, for `jax.custom_vjp`."""
    d_gate_up_ED2F = d_gate_up_EDX.reshape(*d_gate_up_EDX.shape[:2], 2, -1)
    of_gate_up, of_down = saved.like
    return (
        dx_TD.astype(saved.x_TD.dtype),
        None,
        d_gate_TK,
        d_gate_up_ED2F.astype(of_gate_up.dtype),
        d_down_EFD.astype(of_down.dtype),
        None,
    )


def _after(other: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x, which cannot be read before `other` is there."""
    return lax.optimization_barrier((x, other))[0]


def _dot(recipe: Recipe, x_MI: jax.Array, w_EIO: Any, segment: Segment) -> jax.Array:
    """Returns each expert's rows times its weights, [M, O] in x's dtype.

    What nobody's rows have must be finite, and the result has anything there.
    """
    if recipe is None:
        return _product("dot", x_MI, w_EIO, segment.size_E)
    x = recipe.quantize(x_MI, recipe.activations)
    return grouped_fp8.dot(x, w_EIO.mT, segment.size_E, x_MI.dtype)


def _dot_transposed(
    recipe: Recipe, dy_MO: jax.Array, w_EIO: Any, segment: Segment
) -> jax.Array:
    """Returns each expert's rows times its weights' transpose, as `_dot` does."""
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
    """Returns each expert's sum of outer products of its rows, [E, I, O] in `dtype`.

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
