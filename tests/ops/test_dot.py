"""A linear layer's product: its gradients, and which product XLA takes for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jmoe.ops import dot

LINEAR = (((1,), (0,)), ((), ()))

# Shapes of x and w: rows, one row, none; rows in two dimensions; two output dimensions.
SHAPES = {
    "matrix": ((24, 16), (16, 40)),
    "vector": ((16,), (16, 40)),
    "no rows": ((0, 16), (16, 40)),
    "sequences": ((2, 12, 16), (16, 40)),
    "heads": ((2, 12, 16), (16, 4, 10)),
}


def operands(x_shape, w_shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    y_shape = x_shape[:-1] + w_shape[1:]
    shapes = zip(keys, (x_shape, w_shape, y_shape), strict=True)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in shapes)


@pytest.mark.parametrize("name", SHAPES)
def test_product_and_gradients_are_those_of_float64(name):
    x, w, dy = operands(*SHAPES[name])
    y, pull = jax.vjp(dot.linear, x, w)
    dx, dw = pull(dy)
    (K, *features), N = w.shape, int(np.prod(w.shape[1:]))
    x_MK, w_KN, dy_MN = (
        np.asarray(a, np.float64).reshape(shape)
        for a, shape in ((x, (-1, K)), (w, (K, N)), (dy, (-1, N)))
    )
    assert y.shape == (*x.shape[:-1], *features)
    for got, like, expected in (
        (y, y, x_MK @ w_KN),
        (dx, x, dy_MN @ w_KN.T),
        (dw, w, x_MK.T @ dy_MN),
    ):
        assert got.shape == like.shape
        np.testing.assert_allclose(
            got, expected.reshape(like.shape), rtol=1e-5, atol=1e-5
        )


def test_gradients_have_the_operands_dtype():
    x, w, dy = operands((24, 16), (16, 40), jnp.bfloat16)
    y, pull = jax.vjp(dot.linear, x, w)
    dx, dw = pull(dy)
    assert {a.dtype for a in (y, dx, dw)} == {jnp.dtype(jnp.bfloat16)}
    exact = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    np.testing.assert_allclose(np.asarray(dw, np.float32), exact, rtol=2**-8, atol=1e-5)


def test_weights_are_rounded_to_xs_dtype_and_their_gradient_is_not():
    x, _, dy = operands((24, 16), (16, 40), jnp.bfloat16)
    _, w, _ = operands((24, 16), (16, 40))
    y, pull = jax.vjp(dot.linear, x, w)
    _, dw = pull(dy)
    want = dot.linear(x, w.astype(jnp.bfloat16))
    assert y.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y), np.asarray(want))
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    assert dw.dtype == jnp.float32
    np.testing.assert_allclose(dw, exact, rtol=1e-5, atol=1e-5)


def test_outer_takes_options():
    x, _, dy = operands((24, 16), (16, 40), jnp.bfloat16)
    out = dot.outer(x, dy, preferred_element_type=jnp.float32)
    assert out.dtype == jnp.float32
    exact = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "dimensions", "options"),
    [
        ((3, 8, 16), (3, 16, 10), (((2,), (1,)), ((0,), (0,))), {}),
        ((3, 8, 16), (16, 3, 10), (((2,), (0,)), ((0,), (1,))), {}),
        ((16, 8), (16, 10), (((0,), (0,)), ((), ())), {}),
        ((8, 16), (10, 16), (((1,), (1,)), ((), ())), {}),
        ((8, 16), (16, 10), LINEAR, {"preferred_element_type": jnp.float32}),
    ],
    ids=["batch", "batch, linear else", "first of x", "last of w", "result type"],
)
def test_other_products_are_jaxs(x_shape, w_shape, dimensions, options):
    keys = jax.random.split(jax.random.key(1))
    x, w = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, (x_shape, w_shape), strict=True)
    )
    ours = dot.dot_general(x, w, dimensions, **options)
    theirs = lax.dot_general(x, w, dimensions, **options)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_cpu_sums_the_last_dimension_of_the_left_operand():
    """In gradients of weights too: else XLA takes the slower of its two products."""
    x, w, dy = operands((2, 96, 64), (64, 32))

    def gradients(x, w, dy):
        return jax.vjp(dot.dot_general, x, w, (((2,), (0,)), ((), ())))[1](dy)[:2]

    text = jax.jit(gradients).lower(x, w, dy).compile().as_text()
    products = re.findall(r" dot\(.*lhs_contracting_dims=\{(\d)\}", text)
    assert products == ["1", "1"], text


def test_another_platform_multiplies_as_jax_does():
    """There a transpose is free, and a copy of it isn't."""
    operands_ = operands((2, 96, 64), (64, 32))

    def products(linear):
        def gradients(x, w, dy):
            return jax.vjp(linear, x, w)[1](dy)

        traced = jax.jit(gradients).trace(*operands_)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "optimization_barrier" not in text
        return sorted(re.findall(r"dot_general .*?(contracting\S* = .*)", text))

    def plain(x, w):
        return lax.dot_general(x, w, (((2,), (0,)), ((), ())))

    assert len(products(dot.linear)) == 2
    assert products(dot.linear) == products(plain)
