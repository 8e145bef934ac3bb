"""Kernels for Hopper, interpreted on the CPU, against the references they stand for.

Interpreted, threads and their barriers are as on a GPU; that a product is waited for,
and all of the memory's layout, is left to the compiler (tests/hopper/test_kernels.py).

Shapes: M row, N output, K summed, E expert, I and O dimensions of its weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import blocks, fp8
from jmoe.ops.kernels import fp8_grouped, fp8_matmul, fp8_quantize, grouped
from jmoe.ops.rows import row_tiles


def numbers(seed, *shape):
    """Normal, and of different sizes from row to row and from block to block."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(*shape[:-1], fp8.num_blocks(shape[-1])))
    sizes = np.repeat(np.exp(2 * coarse), blocks.BLOCK, axis=-1)[..., : shape[-1]]
    return jnp.asarray(rng.normal(size=shape) * sizes, jnp.float32)


def assert_close(got, want, dtype):
    """Each as close to what it is to be as float32 sums and a rounding to `dtype`."""
    assert got.dtype == want.dtype == dtype and got.shape == want.shape
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got, want, rtol=rounding, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("block", [fp8.ROW, fp8.SQUARE], ids=["row", "square"])
@pytest.mark.parametrize(
    "sizes", [(256, 128, 640), (130, 300, 200), (3, 129, 1), (5, 1, 128)]
)
def test_a_product_is_the_references(sizes, block, dtype, interpreted):
    M, N, K = sizes
    a = fp8.quantize(numbers(0, M, K), fp8.ROW)
    b = fp8.quantize(numbers(1, N, K), block)
    got = fp8_matmul.matmul(*a, *b, dtype=dtype)
    assert_close(got, fp8.matmul(a, b, dtype), dtype)


def test_what_is_not_finite_spoils_its_own_row_only(interpreted):
    a_MK = numbers(0, 130, 256).at[2, 7].set(jnp.nan)
    a, b = fp8.quantize(a_MK), fp8.quantize(numbers(1, 8, 256), fp8.SQUARE)
    got = np.asarray(fp8_matmul.matmul(*a, *b, dtype=jnp.float32))
    assert np.isnan(got[2]).all() and np.isfinite(np.delete(got, 2, 0)).all()


SIZES = {
    "uneven": [40, 0, 100, 1, 131, 0],
    "all of one's": [0, 257, 0],
    "whole tiles": [128, 0, 128],
    "none": [0, 0],
}
each_size = pytest.mark.parametrize("size_E", SIZES.values(), ids=SIZES)


def wide(x):
    return np.asarray(fp8.dequantize(x, jnp.float32))


def weights(experts, outputs, inputs):
    """Each expert's, quantized in squares."""
    w_ENK = numbers(1, experts, outputs, inputs)
    each = [fp8.quantize(w_NK, fp8.SQUARE) for w_NK in w_ENK]
    return jax.tree.map(lambda *x: jnp.stack(x), *each), np.stack(list(map(wide, each)))


@each_size
def test_each_row_is_multiplied_by_its_experts_weights(size_E, interpreted):
    expert_M = np.repeat(np.arange(len(size_E)), size_E)
    owned = len(expert_M)
    x = fp8.quantize(numbers(0, owned + 30, 200))
    w, wide_ENK = weights(len(size_E), 140, 200)
    got = fp8_grouped.dot(*x, *w, jnp.asarray(size_E), dtype=jnp.bfloat16)
    assert got.shape == (owned + 30, 140)
    want = np.einsum("mk,mnk->mn", wide(x)[:owned], wide_ENK[expert_M])
    if owned:
        assert_close(got[:owned], jnp.asarray(want, jnp.bfloat16), jnp.bfloat16)


def test_an_expert_that_is_not_finite_spoils_its_own_rows_only(interpreted):
    size_E = jnp.array([20, 30, 10])
    x = fp8.quantize(numbers(0, 60, 128))
    w, _ = weights(3, 8, 128)
    scale = w.scale.at[1].set(jnp.nan)
    got = np.asarray(fp8_grouped.dot(*x, w.data, scale, size_E, dtype=jnp.float32))
    assert np.isnan(got[20:50]).all()
    assert np.isfinite(got[:20]).all() and np.isfinite(got[50:]).all()


@each_size
def test_each_expert_gets_the_outer_products_of_its_rows(size_E, interpreted):
    size_E = np.array(size_E)
    count_E = -(-size_E // blocks.BLOCK)
    whole_E = blocks.BLOCK * count_E
    end_E = np.cumsum(whole_E)
    start_E = end_E - whole_E
    row_M = np.arange(end_E[-1] + 5)  # the last ones are nobody's
    is_owned_M = np.zeros(row_M.shape, bool)
    for start, size in zip(start_E, size_E, strict=True):
        is_owned_M |= (start <= row_M) & (row_M < start + size)
    x = fp8.quantize(numbers(0, 140, len(row_M)) * is_owned_M)
    dy = fp8.quantize(numbers(1, 70, len(row_M)))
    got = fp8_grouped.outer(*x, *dy, jnp.asarray(count_E), dtype=jnp.float32)
    want = [
        wide(x)[:, start:end] @ wide(dy)[:, start:end].T
        for start, end in zip(start_E, end_E, strict=True)
    ]
    assert_close(got, jnp.asarray(np.stack(want)), jnp.float32)


def numbers_16(seed, *shape):
    return numbers(seed, *shape).astype(jnp.bfloat16)


@each_size
@pytest.mark.parametrize("transposed", [False, True], ids=["w", "w.T"])
def test_in_bfloat16_too(size_E, transposed, interpreted):
    expert_M = np.repeat(np.arange(len(size_E)), size_E)
    owned = len(expert_M)
    x_MK, w_EKN = numbers_16(0, owned + 30, 130), numbers_16(1, len(size_E), 130, 520)
    sizes = jnp.asarray(size_E)
    if transposed:
        got = grouped.dot_transposed(x_MK, w_EKN.mT, sizes)
    else:
        got = grouped.dot(x_MK, w_EKN, sizes)
    assert got.shape == (owned + 30, 520)
    x, w = (np.asarray(x, np.float32) for x in (x_MK, w_EKN))
    want = np.einsum("mk,mkn->mn", x[:owned], w[expert_M])
    if owned:
        assert_close(got[:owned], jnp.asarray(want, jnp.bfloat16), jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@each_size
def test_outer_products_in_bfloat16_are_of_each_experts_rows_only(
    size_E, dtype, interpreted
):
    expert_M = np.repeat(np.arange(len(size_E)), size_E)
    owned = len(expert_M)
    x_MI, dy_MO = numbers_16(0, owned + 30, 140), numbers_16(1, owned + 30, 270)
    got = grouped.outer(x_MI, dy_MO, jnp.asarray(size_E), dtype=dtype)
    assert got.dtype == dtype
    x, dy = (np.asarray(x, np.float32)[:owned] for x in (x_MI, dy_MO))
    each = [expert_M == e for e in range(len(size_E))]
    want = np.stack([x[own].T @ dy[own] for own in each])
    assert_close(got, jnp.asarray(want, dtype), dtype)


def bits(x):
    return np.asarray(x).view(np.uint8 if x.dtype == fp8.DTYPE else np.uint32)


each_scale = pytest.mark.parametrize(
    "power_of_two", [False, True], ids=["any", "power of two"]
)


@each_scale
def test_rows_are_quantized_bit_for_bit(power_of_two, interpreted):
    x_MK = numbers_16(0, 140, 300).at[:, 128:256].set(0)
    x_MK = x_MK.at[3, 7].set(jnp.inf).at[4, 7].set(jnp.nan)
    got = fp8_quantize.rows(x_MK, power_of_two=power_of_two)
    wide_MK = x_MK.astype(jnp.float32)  # not by the kernel
    want = fp8.quantize(wide_MK, power_of_two=power_of_two)
    is_finite_MB = np.isfinite(want.scale)
    assert (~is_finite_MB).sum() == 2
    np.testing.assert_array_equal(np.isfinite(got[1]), is_finite_MB)
    is_finite_MK = np.repeat(is_finite_MB, blocks.BLOCK, axis=1)[:, :300]
    for x, y, known in zip(got, want, (is_finite_MK, is_finite_MB), strict=True):
        np.testing.assert_array_equal(bits(x)[known], bits(y)[known])


@each_scale
@pytest.mark.parametrize("reads_transposed", [True, False])
def test_columns_are_quantized_bit_for_bit(
    reads_transposed, power_of_two, interpreted, monkeypatch
):
    monkeypatch.setattr(fp8_quantize, "READS_TRANSPOSED", reads_transposed)
    jax.clear_caches()
    x_MI = jnp.abs(numbers_16(0, 300, 200))  # else zeros may have a sign
    tile_T4 = row_tiles(jnp.asarray([40, 0, 100, 1, 120]), 300, aligned=blocks.BLOCK)
    data_IP, scale_IT = fp8_quantize.columns(x_MI, tile_T4, power_of_two=power_of_two)
    for t, (_, row, first, end) in enumerate(np.asarray(tile_T4)):
        if first == end == 0:
            continue
        rows_TI = np.zeros((blocks.BLOCK, 200), np.float32)
        rows_TI[first - row : end - row] = x_MI[first:end].astype(jnp.float32)
        want = fp8.quantize(jnp.asarray(rows_TI.T), power_of_two=power_of_two)
        got_IT = data_IP[:, t * blocks.BLOCK : (t + 1) * blocks.BLOCK]
        np.testing.assert_array_equal(bits(got_IT), bits(want.data))
        np.testing.assert_array_equal(bits(scale_IT[:, t]), bits(want.scale[:, 0]))
