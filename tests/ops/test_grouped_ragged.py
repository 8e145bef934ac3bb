"""What kernels may do that the reference on CPU doesn't, and what segments cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import grouped, grouped_ragged, segments
from tests.programs import equations

T, K, D, E, F = 300, 3, 16, 5, 8
NOBODY = E
SEGMENT = 3 * segments.TILE  # holds T
FIRST = {None: 8 * segments.TILE, 450: 4 * segments.TILE, 225: SEGMENT}


@functools.partial(jax.jit, static_argnums=0)
def gradients(routed_mlp, expert_TK, x_TD, gate_TK, gate_up_ED2F, down_EFD):
    def total(*floats):
        x_TD, *rest = floats
        return (routed_mlp(x_TD, expert_TK, *rest) ** 2).sum()

    floats = x_TD, gate_TK, gate_up_ED2F, down_EFD
    return jax.value_and_grad(total, argnums=(0, 1, 2, 3))(*floats)


def arrays(of_nobody):
    """Choices, of which this share is nobody's, and floats."""
    rng = np.random.default_rng(0)
    expert_TK = np.stack([rng.choice(E, K, replace=False) for _ in range(T)])
    expert_TK[rng.random((T, K)) < of_nobody] = NOBODY
    shapes = (T, D), (T, K), (E, D, 2, F), (E, F, D)
    return expert_TK, *(rng.normal(size=s).astype(np.float32) for s in shapes)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("of_nobody", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("rows", FIRST)
def test_what_a_kernel_leaves_in_rows_of_nobody_reaches_no_result(
    rows, of_nobody, apart, monkeypatch
):
    product = grouped_ragged._product

    def leaves_memory_as_it_was(name, left, right, size_E, **dtype):
        out = product(name, left, right, size_E, **dtype)
        if name == "outer":
            assert left.shape[0] == right.shape[0]
            first = SEGMENT if apart else FIRST[rows]
            assert left.shape[0] in (first, SEGMENT)
            # A kernel multiplies whole tiles, in which nobody's rows count as zero.
            return out + 0 * (left.sum() + right.sum())
        rows_M = jnp.arange(out.shape[0])[:, None]
        return jnp.where(rows_M < size_E.sum(), out, jnp.nan)

    given_arrays = arrays(of_nobody)
    want = gradients(grouped.BACKENDS["blocks"], *given_arrays)
    monkeypatch.setattr(grouped_ragged, "_product", leaves_memory_as_it_was)
    routed_mlp = functools.partial(grouped.BACKENDS["ragged"], rows=rows, apart=apart)
    got = gradients(routed_mlp, *given_arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_a_device_with_all_experts_has_one_segment_and_no_loop():
    def loops(rows):
        routed_mlp = functools.partial(grouped.BACKENDS["ragged"], rows=rows)
        traced = jax.make_jaxpr(functools.partial(gradients, routed_mlp))(*arrays(0.0))
        found = equations(traced.jaxpr)
        return sum(equation.primitive.name == "while" for equation, _ in found)

    assert loops(None) == 0
    assert loops(T * K // 2) > 0


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("rows", [1, 2 * SEGMENT])
def test_rows_beyond_a_bound_are_computed_in_short_segments(rows, apart):
    """And waiting for another array changes nothing."""
    options = {"rows": rows, "is_bound": True, "apart": apart, "after": jnp.ones(2)}
    routed_mlp = functools.partial(grouped.BACKENDS["ragged"], **options)
    lengths = segments.lengths_of((T, K), rows, is_bound=True, apart=apart)
    first = min(rows, T) if apart else rows
    assert lengths.first == -(-first // 128) * 128 and lengths.later == 128
    given_arrays = arrays(0.2)
    got = gradients(routed_mlp, *given_arrays)
    want = gradients(grouped.BACKENDS["blocks"], *given_arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def carried(is_bound):
    """Shapes and dtypes that loops carry, of an MLP and its gradients in bfloat16."""
    options = {"rows": T, "is_bound": is_bound}
    routed_mlp = functools.partial(grouped.BACKENDS["ragged"], **options)
    expert_TK, *floats = arrays(0.2)
    floats = [x.astype(jnp.bfloat16) for x in floats]
    traced = jax.make_jaxpr(functools.partial(gradients, routed_mlp))
    found = equations(traced(expert_TK, *floats).jaxpr)
    loops = [e for e, _ in found if e.primitive.name == "while"]
    return {(v.aval.shape, v.aval.dtype.name) for e in loops for v in e.outvars}


def test_tokens_sums_take_twice_the_room_only_where_they_are_often_of_several_parts():
    wide, narrow = ((T, D), "float32"), ((T, D), "bfloat16")
    assert wide in carried(False) and narrow not in carried(False)
    assert narrow in carried(True) and wide not in carried(True)


def test_a_pass_that_computes_again_what_it_is_given_does_not_wait():
    """What a forward pass waits for isn't computed a second time for the backward."""
    expert_TK, *floats = arrays(0.2)

    def products(is_waited_for):
        def both(*floats):
            run = functools.partial(grouped.BACKENDS["ragged"], floats[0], expert_TK)
            y_TD = run(*floats[1:])
            return y_TD + run(*floats[1:], after=y_TD if is_waited_for else None)

        again = jax.grad(lambda *floats: jax.checkpoint(both)(*floats).sum())
        found = [
            e.primitive.name for e, _ in equations(jax.make_jaxpr(again)(*floats).jaxpr)
        ]
        return found.count("ragged_dot_general"), found.count("optimization_barrier")

    count, barriers = products(True)
    assert count == products(False)[0] and barriers > products(False)[1]
