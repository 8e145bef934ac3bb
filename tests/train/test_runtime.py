"""What scripts set up in their process."""

import pathlib
import platform

import jax
import pytest

from jmoe.train.runtime import keep_compiled, keep_freed_memory, step_after_step

ASYNC = "jax_cpu_enable_async_dispatch"
CACHE = "jax_compilation_cache_dir"


@pytest.fixture
def set_cache():
    """Sets JAX's cache for a test."""
    before = jax.config.values[CACHE]
    yield lambda directory: jax.config.update(CACHE, directory)
    jax.config.update(CACHE, before)


def test_glibc_and_no_other_library_keeps_freed_memory():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_steps_on_a_cpu_follow_one_another():
    before = jax.config.values[ASYNC]
    step_after_step()
    assert jax.config.values[ASYNC] is False
    jax.config.update(ASYNC, before)


def test_compiled_programs_are_kept_where_told_unless_the_user_has_chosen(set_cache):
    set_cache(None)
    keep_compiled(pathlib.Path("ours"))
    assert jax.config.values[CACHE] == "ours"
    set_cache("theirs")
    keep_compiled(pathlib.Path("ours"))
    assert jax.config.values[CACHE] == "theirs"
