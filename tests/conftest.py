"""Sixteen virtual CPU devices, one compilation cache for all test runs, two workers.

Most of a test run is compiling, which keeps one core busy. So where pytest-xdist is,
and nothing else is asked (`-n 0`), the default tier is shared out by file.
"""

import os
import pathlib
import tempfile

_FLAG = "--xla_force_host_platform_device_count=16"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

DEFAULT_TIER = "not gpu and not hopper and not serving"  # as pyproject.toml has it

_CACHE = pathlib.Path(tempfile.gettempdir()) / f"jmoe_test_cache_{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Comes before pytest-xdist's own, which starts as many workers as are asked."""
    option = config.option
    unasked = getattr(option, "numprocesses", 0) is None and not option.usepdb
    if unasked and option.markexpr == DEFAULT_TIER and option.file_or_dir == []:
        option.numprocesses, option.dist = min(2, os.cpu_count() or 1), "loadfile"
