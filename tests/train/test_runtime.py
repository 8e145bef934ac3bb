"""What scripts set up in their process."""

import ctypes
import os
import platform
import subprocess
import sys

import jax
import pytest

from jmoe.train.runtime import keep_compiled, keep_freed_memory, step_after_step

ASYNC = "jax_cpu_enable_async_dispatch"
CACHE = "jax_compilation_cache_dir"

# A new process allocates 64 MiB: how many bytes it then has outside of its heap.
ALLOCATE = """
import ctypes
from jmoe.train.runtime import keep_freed_memory

class Info(ctypes.Structure):  # mallinfo2's result
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
        "uordblks", "fordblks", "keepcost")]

keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.mallinfo2.restype = Info
before = libc.mallinfo2().hblkhd
assert libc.malloc(2**26)
print(libc.mallinfo2().hblkhd - before)
"""


@pytest.fixture
def set_cache():
    """Sets JAX's cache for a test."""
    before = jax.config.values[CACHE]
    yield lambda directory: jax.config.update(CACHE, directory)
    jax.config.update(CACHE, before)


def test_glibc_and_no_other_library_keeps_freed_memory():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"
)
@pytest.mark.parametrize("flags", ["", "--xla_force_host_platform_device_count=4"])
def test_large_blocks_of_several_devices_are_returned_when_freed(flags):
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", ALLOCATE]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    outside = int(done.stdout)
    assert outside >= 2**26 if flags else outside == 0


def test_steps_on_a_cpu_follow_one_another():
    before = jax.config.values[ASYNC]
    step_after_step()
    assert jax.config.values[ASYNC] is False
    jax.config.update(ASYNC, before)


def test_compiled_programs_are_kept_where_told_unless_the_user_has_chosen(
    set_cache, tmp_path
):
    ours = tmp_path / "new" / "ours"
    set_cache(None)
    keep_compiled(ours)
    assert jax.config.values[CACHE] == str(ours) and ours.is_dir()
    set_cache("theirs")
    keep_compiled(ours)
    assert jax.config.values[CACHE] == "theirs"
