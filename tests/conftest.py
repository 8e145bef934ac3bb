"""Sixteen virtual CPU devices, and one compilation cache for all test runs.

Compiling is most of what tests take. Without LLVM's optimizations, and with XLA's older
way to emit what it has fused, it takes a quarter of the time.
"""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

_flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=16",
    "--xla_backend_optimization_level=0",
]
if jax.__version_info__ < (0, 11):  # later ones have the newer way alone
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_flags).strip()

_CACHE = pathlib.Path(tempfile.gettempdir()) / f"jmoe_test_cache_{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
