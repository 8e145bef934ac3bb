"""Sixteen virtual CPU devices, and one compilation cache for all test runs.

Programs are compiled without LLVM's optimizations: that takes half the time, which is
most of what tests take.
"""

import os
import pathlib
import tempfile

_FLAGS = (
    "--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

_CACHE = pathlib.Path(tempfile.gettempdir()) / f"jmoe_test_cache_{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
