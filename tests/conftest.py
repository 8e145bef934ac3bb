"""Sixteen virtual CPU devices, and one compilation cache for all test runs."""

import os
import pathlib
import tempfile

_FLAG = "--xla_force_host_platform_device_count=16"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

_CACHE = pathlib.Path(tempfile.gettempdir()) / f"jmoe_test_cache_{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
