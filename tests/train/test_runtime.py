"""What scripts set up in their process."""

import ctypes
import os
import platform
import shlex
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.train import runtime
from jmoe.train.runtime import keep_compiled, keep_freed_memory, step_after_step

ASYNC = "jax_cpu_enable_async_dispatch"
CACHE = "jax_compilation_cache_dir"
ENABLED = "jax_enable_compilation_cache"
LEAST = "jax_persistent_cache_min_compile_time_secs"

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


class Flag(NamedTuple):
    name: str
    value: str


@pytest.fixture
def set_cache():
    """Sets JAX's cache for a test, in which all that is compiled is kept."""
    before = {name: jax.config.values[name] for name in (CACHE, ENABLED, LEAST)}

    def set_(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    yield lambda directory: set_({CACHE: directory, LEAST: 0})
    set_(before)


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
    set_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    ours = tmp_path / "new" / "ours"
    set_cache(None)
    keep_compiled(ours)
    assert jax.config.values[CACHE] == str(ours) and ours.is_dir()
    set_cache("theirs")
    keep_compiled(ours)
    assert jax.config.values[CACHE] == "theirs"


def test_nothing_is_kept_for_several_devices_of_a_cpu(set_cache, tmp_path):
    set_cache(str(tmp_path))
    jax.jit(lambda x: x + 2)(1.0)
    before = {*tmp_path.iterdir()}
    keep_compiled(tmp_path / "ours")
    assert not jax.config.values[ENABLED]  # so nothing is read either
    jax.jit(lambda x: x + 3)(1.0)
    assert {*tmp_path.iterdir()} == before != set()


def test_these_tests_keep_programs_of_one_device(set_cache, tmp_path):
    """Others', read back, would hang: see `keep_compiled`."""
    set_cache(str(tmp_path))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    split = jax.device_put(np.ones(2), NamedSharding(mesh, PartitionSpec("x")))
    jax.jit(lambda x: x + 4)(split)
    assert not [*tmp_path.iterdir()]
    jax.jit(lambda x: x + 4)(np.ones(2))
    assert [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("top_k=9"), 2, "error: top_k=9\n"),
        (FileNotFoundError("no run"), 2, "error: no run\n"),
        (MemoryError(), 2, "error: There is too little memory for this.\n"),
        (KeyboardInterrupt(), 130, "SIGINT: ended.\n"),
        (FloatingPointError("Step 3 skipped"), 3, "error: Step 3 skipped\n"),
    ],
)
def test_an_error_ends_a_program_in_a_line_or_less(error, code, said, capsys):
    def main(argv):
        raise error

    assert runtime._answer(main, []) == code
    assert capsys.readouterr().err == said


def test_an_error_of_ours_is_not_taken_for_the_users():
    with pytest.raises(KeyError):
        runtime._answer(lambda argv: {}["absent"], [])


def test_output_that_nobody_reads_ends_a_program_without_a_word():
    write = "import sys; from jmoe.train import runtime\n"
    write += "sys.exit(runtime._answer(lambda argv: print('much ' * 10**6), []))"
    command = (
        f"{sys.executable} -c {shlex.quote(write)} | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("given", ["naïve", "na\udcc3\udcafve"])
def test_a_prompt_is_utf8_whatever_the_locale(given):
    assert runtime.text(Flag("prompt", given)) == "naïve"


def test_a_prompt_that_is_not_utf8_is_refused():
    with pytest.raises(ValueError, match="prompt=.* must be UTF-8; .* byte offset 2"):
        runtime.text(Flag("prompt", "ab\udcff"))


def test_a_platform_without_devices_is_named(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match="JAX_PLATFORMS=.*: JAX finds no such device"):
        runtime.start_jax()
