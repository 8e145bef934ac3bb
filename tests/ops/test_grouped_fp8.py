"""Products of each expert's rows in FP8, against one expert after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import blocks, fp8, grouped_fp8

I, O = 200, 70  # noqa: E741
RECIPE = fp8.RECIPES["fp8"]
SIZES = {
    "uneven": [40, 0, 130, 1, 0],
    "all_of_ones": [0, 0, 171, 0, 0],
    "none": [0, 0, 0, 0, 0],
}
OF_NOBODY = 29

each_size = pytest.mark.parametrize("size_E", SIZES.values(), ids=SIZES)


def numbers(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def ranges(size_E):
    end_E = np.cumsum(size_E)
    return [slice(end - size, end) for size, end in zip(size_E, end_E, strict=True)]


@each_size
def test_each_row_is_multiplied_by_its_experts_weights(size_E):
    x = fp8.quantize(numbers(0, sum(size_E) + OF_NOBODY, I))
    w = fp8.quantize(numbers(1, len(size_E), O, I), fp8.SQUARE)
    got = jax.jit(grouped_fp8.dot, static_argnums=3)(
        x, w, jnp.array(size_E), jnp.float32
    )
    assert got.shape == (sum(size_E) + OF_NOBODY, O)
    for expert, rows in enumerate(ranges(size_E)):
        of_expert = jax.tree.map(lambda part, e=expert: part[e], w)
        its_rows = jax.tree.map(lambda part, r=rows: part[r], x)
        want = fp8.matmul(its_rows, of_expert, jnp.float32)
        np.testing.assert_allclose(got[rows], want, rtol=1e-5, atol=1e-4)


@each_size
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_blocks_along_rows_are_what_an_expert_has_of_a_tile(size_E, dtype):
    rows = sum(size_E) + OF_NOBODY
    x, dy = numbers(0, rows, I).astype(dtype), numbers(1, rows, O).astype(dtype)
    outer = jax.jit(grouped_fp8.outer, static_argnums=(3, 4))
    got = outer(x, dy, jnp.array(size_E), RECIPE, dtype)
    assert got.shape == (len(size_E), I, O) and got.dtype == dtype
    for expert, own in enumerate(ranges(size_E)):
        first = (
            own.start % blocks.BLOCK
        )  # what comes before it, in its first tile, is zero
        filled = (jnp.pad(rows[own], ((first, 0), (0, 0))).T for rows in (x, dy))
        want = fp8.matmul(*map(fp8.quantize, filled), dtype)
        tolerance = 1e-4 if dtype == jnp.float32 else 2**-6
        np.testing.assert_allclose(
            *(np.asarray(part, np.float32) for part in (got[expert], want)),
            rtol=tolerance,
            atol=1e-4,
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_expert_only(bad):
    size_E = jnp.array([40, 30, 60])
    x_MI, dy_MO = numbers(0, 130, I).at[45, 3].set(bad), numbers(1, 130, O)
    got = np.asarray(grouped_fp8.outer(x_MI, dy_MO, size_E, RECIPE, jnp.float32))
    assert np.isnan(got[1, 3]).all()
    assert np.isfinite(got[[0, 2]]).all() and np.isfinite(np.delete(got[1], 3, 0)).all()
