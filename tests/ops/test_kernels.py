"""Kernels for Hopper, interpreted on the CPU, against the references they stand for.

Interpreted, threads and their barriers are as on a GPU; that a product is waited for,
and all of the memory's layout, is left to the compiler (tests/hopper/test_kernels.py).

Shapes: M and N row, K summed, of `jmoe.ops.kernels`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.ops import fp8
from jmoe.ops.kernels import fp8_matmul


@pytest.fixture
def interpreted():
    """Kernels that are called meanwhile are interpreted, as if for a small GPU."""
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip(f"JAX {jax.__version__} can't interpret these kernels.")
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H20", platform="gpu", num_cores=4
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), plgpu.force_gpu_interpret_mode():
        yield


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
