"""Kernels without a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.ops.kernels import stream, tensor_cores


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels that are called meanwhile are interpreted, as if for a small GPU."""
    monkeypatch.setattr(stream, "num_sms", lambda: 4)
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip(f"JAX {jax.__version__} can't interpret these kernels.")
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H20", platform="gpu", num_cores=4
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), plgpu.force_gpu_interpret_mode():
        yield


@pytest.fixture
def product_by_jax(monkeypatch):
    """The interpreter hasn't those of what is in registers, or with a start."""

    def product(a, b, start=0.0):
        a, b = (x[...].astype(jnp.float32) for x in (a, b))
        return start + jnp.dot(a, b)

    monkeypatch.setattr(tensor_cores, "product", product)
