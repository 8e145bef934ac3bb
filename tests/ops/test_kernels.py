"""Kernels for Hopper, interpreted on the CPU, against the references they stand for.

Interpreted, threads and their barriers are as on a GPU; that a product is waited for,
and all of the memory's layout, is left to the compiler (tests/hopper/test_kernels.py).

Shapes: M row, N output, K summed, E expert, I and O dimensions of its weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops import fp8
from jmoe.ops.kernels import fp8_grouped, fp8_matmul


def numbers(seed, *shape):
    """Normal, and of different sizes from row to row and from block to block."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(*shape[:-1], fp8.num_blocks(shape[-1])))
    sizes = np.repeat(np.exp(2 * coarse), fp8.BLOCK, axis=-1)[..., : shape[-1]]
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
    whole_E = fp8.BLOCK * -(-size_E // fp8.BLOCK)
    end_E = np.cumsum(whole_E)
    start_E = end_E - whole_E
    row_M = np.arange(end_E[-1] + 5)  # the last ones are nobody's
    is_owned_M = np.zeros(row_M.shape, bool)
    for start, size in zip(start_E, size_E, strict=True):
        is_owned_M |= (start <= row_M) & (row_M < start + size)
    x = fp8.quantize(numbers(0, 140, len(row_M)) * is_owned_M)
    dy = fp8.quantize(numbers(1, 70, len(row_M)))
    got = fp8_grouped.outer(*x, *dy, jnp.asarray(size_E), dtype=jnp.float32)
    want = [
        wide(x)[:, start:end] @ wide(dy)[:, start:end].T
        for start, end in zip(start_E, end_E, strict=True)
    ]
    assert_close(got, jnp.asarray(np.stack(want)), jnp.float32)


@pytest.mark.parametrize("experts", [1, 6])
def test_tasks_take_each_row_once_for_its_expert(experts):
    num_rows = 300 * experts
    tasks = jax.jit(fp8_grouped.tasks, static_argnums=1)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 300), min_size=experts, max_size=experts))
    def check(size_E):
        task_T4 = np.asarray(tasks(jnp.asarray(size_E), num_rows))
        assert len(task_T4) == -(-num_rows // fp8_grouped.TILE) + experts - 1
        nobody = -1
        expert_M = np.full(num_rows, nobody)
        for expert, tile, first, end in task_T4:
            if first < end:
                rows_of_tile = range(tile * fp8_grouped.TILE, num_rows)[
                    : fp8_grouped.TILE
                ]
                assert first in rows_of_tile and end - 1 in rows_of_tile
                assert (expert_M[first:end] == nobody).all()
                expert_M[first:end] = expert
        want = np.repeat([*range(experts), nobody], [*size_E, num_rows - sum(size_E)])
        np.testing.assert_array_equal(expert_M, want)

    check()
