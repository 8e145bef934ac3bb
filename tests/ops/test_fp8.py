"""Block-scaled FP8 against an oracle in numpy, and against what its format allows.

Shapes: M row, K summed, N column.
"""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops import blocks, fp8

ROUNDING = 1 + 2**-22  # of the division and the product, in float32


def largest_of_blocks(x):
    """The largest magnitude of each element's block."""
    starts = np.arange(0, x.shape[-1], blocks.BLOCK)
    largest = np.maximum.reduceat(np.abs(x), starts, axis=-1)
    return np.repeat(largest, blocks.BLOCK, axis=-1)[..., : x.shape[-1]]


def round_trip(x, dtype=np.float32):
    return np.asarray(fp8.dequantize(fp8.quantize(jnp.asarray(x)), dtype))


def allowed_error(x):
    half_smallest_step = largest_of_blocks(x) / fp8.LARGEST * 2**-10
    return ROUNDING * np.maximum(np.abs(x) / 16, half_smallest_step)


@pytest.mark.parametrize(
    ("shape", "blocks"), [((3, 256), 2), ((2, 2, 200), 2), ((5, 7), 1), ((300,), 3)]
)
def test_the_error_is_within_the_formats_rounding(shape, blocks):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=shape, scale=4))
    x = x.astype(np.float32)
    got = fp8.quantize(jnp.asarray(x))
    assert got.data.dtype == fp8.DTYPE and got.data.shape == shape
    assert got.scale.dtype == np.float32
    assert got.scale.shape == (*shape[:-1], blocks)
    assert fp8.num_blocks(shape[-1]) == blocks
    error = np.abs(round_trip(x) - x)
    assert (error <= allowed_error(x)).all()
    assert error.max() > 0


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=9))
def test_any_finite_numbers_stay_finite_and_close(numbers):
    x = np.zeros(130, np.float32)
    x[: len(numbers)] = numbers
    tiny = np.finfo(np.float32).tiny  # below it, as zero: scales are normal numbers
    error = np.abs(round_trip(x) - x)
    assert (error <= np.maximum(allowed_error(x), tiny)).all()


def test_the_largest_of_a_block_is_exact_and_does_not_overflow():
    x = np.random.default_rng(0).uniform(-1e4, 1e4, (50, 128)).astype(np.float32)
    x[:, 5] = 465.0 * 1.7 ** np.arange(-25, 25)
    got = fp8.quantize(jnp.asarray(x))
    assert np.abs(got.data.astype(np.float32)).max(-1).tolist() == [448] * 50
    at = np.abs(x).argmax(-1)[:, None]
    want = np.take_along_axis(x, at, -1)
    np.testing.assert_allclose(
        np.take_along_axis(round_trip(x), at, -1), want, rtol=2**-22
    )


def test_an_outlier_disturbs_only_its_own_block():
    x = np.random.default_rng(0).normal(size=(2, 3 * blocks.BLOCK)).astype(np.float32)
    spoiled = x.copy()
    spoiled[1, blocks.BLOCK] = 1e6
    changed = round_trip(spoiled) != round_trip(x)
    assert changed[1, blocks.BLOCK : 2 * blocks.BLOCK].all()
    assert not changed[0].any() and changed.sum() == blocks.BLOCK


def test_zeros_stay_zeros():
    x = np.zeros((2, 200), np.float32)
    x[1, :128] = 1.0
    np.testing.assert_array_equal(round_trip(x), x)


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any", "power of two"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_block_and_is_not_hidden(bad, power_of_two):
    x = np.ones((1, 256), np.float32)
    x[0, 3] = bad
    quantized = fp8.quantize(x, power_of_two=power_of_two)
    assert np.isfinite(quantized.scale).tolist() == [[False, True]]
    for got in (
        fp8.dequantize(quantized, np.float32),
        fp8.rounded(x, power_of_two=power_of_two),
    ):
        assert (
            np.isnan(got[0, : blocks.BLOCK]).all()
            and (got[0, blocks.BLOCK :] == 1).all()
        )


def test_bfloat16_in_and_out():
    x = jax.random.normal(jax.random.key(0), (4, 130), jnp.bfloat16)
    got = round_trip(x, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(x, np.float32)
    error = np.abs(got.astype(np.float32) - want)
    assert (error <= allowed_error(want) + 2**-8 * np.abs(want)).all()


BLOCKS = {
    "row": fp8.ROW,
    "column": (blocks.BLOCK, 1),
    "square": fp8.SQUARE,
    "tensor": fp8.TENSOR,
}


def oracle(x, block, power_of_two):
    """Data and scales, block by block, for the last two dimensions of x."""
    if len(block) == 1:
        block = (1, *block)
    rows, columns = (
        size if size != blocks.WHOLE else dim
        for size, dim in zip(block, x.shape, strict=True)
    )
    data = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
    starts = range(0, x.shape[0], rows), range(0, x.shape[1], columns)
    scale = np.zeros([len(s) for s in starts], np.float32)
    for (i, r), (j, c) in itertools.product(*map(enumerate, starts)):
        here = np.s_[r : r + rows, c : c + columns]
        largest = np.abs(x[here]).max() * np.float32(1 / 448)
        of_block = max(largest, np.finfo(np.float32).tiny)
        if power_of_two:
            of_block = np.exp2(np.ceil(np.log2(np.float64(of_block))))
        scale[i, j] = of_block
        data[here] = (x[here] / np.float32(of_block)).astype(data.dtype)
    return data, scale


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any", "power of two"])
@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (7, 300), (200, 5)])
@pytest.mark.parametrize("block", BLOCKS)
def test_quantizing_is_the_oracles_to_the_bit(block, shape, power_of_two):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * np.exp(3 * rng.normal(size=shape))).astype(np.float32)
    x[:, :2] = 0
    x[0, -1] = 448 * 2.0**-3  # whose scale is a power of two already
    want, scale = oracle(x, BLOCKS[block], power_of_two)
    got = fp8.quantize(x, BLOCKS[block], power_of_two=power_of_two)
    assert np.asarray(got.data).tobytes() == want.tobytes()
    left = fp8.rounded(x, BLOCKS[block], power_of_two=power_of_two)
    assert (
        np.asarray(left).tobytes() == np.asarray(fp8.dequantize(got, x.dtype)).tobytes()
    )
    assert np.asarray(got.scale).tobytes() == scale.tobytes()
    back = np.asarray(fp8.dequantize(got, np.float32))
    rows, columns = (
        np.minimum(np.arange(dim) // (1 if count == dim else blocks.BLOCK), count - 1)
        for dim, count in zip(shape, scale.shape, strict=True)
    )
    wide = scale[rows[:, None], columns]
    assert back.tobytes() == (want.astype(np.float32) * wide).tobytes()


def rounding_bound(x, largest):
    """How far an element may be from what it was; `largest` of its block."""
    return ROUNDING * np.maximum(np.abs(x) / 16, largest / fp8.LARGEST * 2**-10)


def product_bound(a, b, da, db):
    """Bounds the error of a @ b, with elements off by da and db, summed in float32."""
    exact = da @ np.abs(b) + np.abs(a) @ db + da @ db
    return exact + a.shape[1] * 2**-22 * (np.abs(a) + da) @ (np.abs(b) + db)


def square_largest(w):
    rows, columns = (range(0, dim, blocks.BLOCK) for dim in w.shape)
    largest = np.zeros_like(w)
    for r, c in itertools.product(rows, columns):
        here = np.s_[r : r + blocks.BLOCK, c : c + blocks.BLOCK]
        largest[here] = np.abs(w[here]).max()
    return largest


def operands(sizes, outlier=None):
    rng = np.random.default_rng(1)
    rows, summed, columns = sizes
    x = rng.normal(size=(rows, summed)).astype(np.float32)
    if outlier is not None:  # a few channels, as activations have them
        x[:, :: summed // 2] *= outlier
    w = rng.normal(size=(summed, columns), scale=0.05).astype(np.float32)
    dy = rng.normal(size=(rows, columns), scale=1e-6).astype(np.float32)
    return x, w, dy


def products(recipe, x, w, dy):
    y, pull = jax.vjp(lambda x, w: fp8.fp8_dot(x, w, fp8.RECIPES[recipe]), x, w)
    return [np.asarray(z, np.float64) for z in (y, *pull(dy))]


@pytest.mark.parametrize("outlier", [None, 1e4])
@pytest.mark.parametrize("sizes", [(256, 384, 256), (130, 200, 70), (3, 129, 1)])
def test_all_three_products_are_off_by_no_more_than_their_operands(sizes, outlier):
    arrays = operands(sizes, outlier)
    y, dx, dw = products("fp8", *arrays)
    x, w, dy = (z.astype(np.float64) for z in arrays)
    off_x = rounding_bound(x, largest_of_blocks(x))
    off_w = rounding_bound(w, square_largest(w))
    off_dy = rounding_bound(dy, largest_of_blocks(dy))
    for got, want, bound in [
        (y, x @ w, product_bound(x, w, off_x, off_w)),
        (dx, dy @ w.T, product_bound(dy, w.T, off_dy, off_w.T)),
    ]:
        assert (np.abs(got - want) <= bound).all()
        assert np.abs(got - want).max() > 0.01 * bound.max()
    # x is quantized twice, the second time along its columns.
    once = np.abs(x) + off_x
    off_xT = off_x.T + rounding_bound(once.T, largest_of_blocks(once.T))
    off_dyT = rounding_bound(dy.T, largest_of_blocks(dy.T))
    bound = product_bound(x.T, dy, off_xT, off_dyT.T)
    assert (np.abs(dw - x.T @ dy) <= bound).all()


def test_outliers_are_what_a_scale_for_the_whole_tensor_fails_at():
    x, w, dy = operands((256, 512, 64))
    x[0, 0] = 1e6  # one number in one token
    want = (x.astype(np.float64) @ w)[1:]

    def error(recipe):
        got = products(recipe, x, w, dy)[0][1:]
        return np.linalg.norm(got - want) / np.linalg.norm(want)

    assert error("fp8") < 0.05
    assert error("fp8_power_of_two") < 0.06
    assert error("fp8_tensor") > 0.9  # of all others, few numbers are not zeros


def test_the_recipes_differ_in_what_they_say_and_in_nothing_else():
    x, w, dy = operands((256, 384, 256))
    found = {recipe: products(recipe, x, w, dy) for recipe in fp8.RECIPES}
    y, dx, dw = found["fp8"]
    np.testing.assert_array_equal(found["fp8_square_gradients"][0], y)
    for other in (dx, dw):
        place = 1 if other is dx else 2
        assert (found["fp8_square_gradients"][place] != other).any()
    for i, want in enumerate((x @ w, dy @ w.T, x.T @ dy)):
        for recipe in fp8.RECIPES:
            off = np.linalg.norm(found[recipe][i] - want) / np.linalg.norm(want)
            assert 0.01 < off < 0.06, recipe


def test_a_layer_takes_it_as_its_product():
    x = jax.random.normal(jax.random.key(0), (2, 5, 150))
    dot_general = fp8.dot_general("fp8")
    dense = nn.Dense(40, use_bias=False, dot_general=dot_general)
    variables = dense.init(jax.random.key(1), x)
    want = fp8.fp8_dot(x, variables["params"]["kernel"], fp8.RECIPES["fp8"])
    np.testing.assert_array_equal(dense.apply(variables, x), want)
    assert want.shape == (2, 5, 40)
    w = jax.random.normal(jax.random.key(2), (150, 3, 7))
    several = dot_general(x, w, (((2,), (0,)), ((), ())))
    flat = dot_general(x, w.reshape(150, 21), (((2,), (0,)), ((), ())))
    np.testing.assert_array_equal(several.reshape(2, 5, 21), flat)


@pytest.mark.parametrize(
    "dimension_numbers", [(((0,), (0,)), ((), ())), (((2,), (1,)), ((0,), (0,)))]
)
def test_other_products_are_refused(dimension_numbers):
    dot_general = fp8.dot_general("fp8")
    x = jnp.ones((2, 2, 2))
    with pytest.raises(ValueError, match="a linear layer's"):
        dot_general(x, x, dimension_numbers)


def test_weights_are_rounded_to_xs_dtype_and_their_gradient_is_not():
    w = jax.random.normal(jax.random.key(0), (130, 2, 3))
    x = jax.random.normal(jax.random.key(1), (200, 130), jnp.bfloat16)
    found = []
    for held in (w, w.astype(jnp.bfloat16)):
        y, pull = jax.vjp(lambda w: fp8.fp8_dot(x, w, fp8.RECIPES["fp8"]), held)
        found.append((y, *pull(y)))
    (y, dw), (want, rounded) = found
    np.testing.assert_array_equal(np.asarray(y), np.asarray(want))
    assert dw.dtype == jnp.float32 and dw.shape == w.shape
    np.testing.assert_array_equal(
        np.asarray(dw.astype(jnp.bfloat16)), np.asarray(rounded)
    )
    assert (dw != rounded.astype(jnp.float32)).any()


def test_no_rows_and_bfloat16():
    w = jax.random.normal(jax.random.key(0), (130, 6), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (4, 130), jnp.bfloat16)
    for rows in (4, 0):
        y, pull = jax.vjp(lambda *z: fp8.fp8_dot(*z, fp8.RECIPES["fp8"]), x[:rows], w)
        dx, dw = pull(y)
        assert y.shape == (rows, 6) and dx.shape == (rows, 130) and dw.shape == w.shape
        assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    assert not np.asarray(dw, np.float32).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_token_and_the_weights_gradient(bad):
    x, w, dy = operands((4, 256, 8))
    x[2, 7] = bad
    y, dx, dw = products("fp8", x, w, dy)
    assert np.isnan(y[2]).all() and np.isfinite(np.delete(y, 2, 0)).all()
    assert np.isfinite(dx).all()
    assert np.isnan(dw[:128]).all() and np.isfinite(dw[128:]).all()
    dy[1, 0] = bad
    _, dx, dw = products("fp8", x, w, dy)
    assert np.isnan(dx[1]).all() and np.isfinite(np.delete(dx, 1, 0)).all()
    assert np.isnan(dw[:, 0]).all()


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_products_of_what_is_left_of_operands_are_fp8_products(recipe):
    x, w, dy = map(jnp.asarray, operands((130, 256, 200)))
    how = fp8.RECIPES[recipe]
    left = fp8.roundings(how)
    kept = left.activations(x)  # from which the weights' gradient is computed
    kept = how.round(kept, fp8.transposed(how.activations))
    want = (
        left.activations(x) @ left.weights(w),
        left.gradients(dy) @ left.weights(w).T,
        kept.T @ how.round(dy, fp8.transposed(how.gradients)),
    )
    for product, of_left in zip(products(recipe, x, w, dy), want, strict=True):
        off = 1e-5 * np.abs(of_left).max()
        np.testing.assert_allclose(product, of_left, rtol=0, atol=off)
    none = fp8.roundings(None)
    assert all(rounding(x) is x for rounding in none)
