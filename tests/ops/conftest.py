"""Kernels without a GPU."""

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


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
