"""Sixteen virtual CPU devices, and one compilation cache for all test runs."""

import gc
import os
import pathlib
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from jax._src import compilation_cache  # noqa: E402

_CACHE = pathlib.Path(tempfile.gettempdir()) / f"jmoe_test_programs_{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

_TESTS = pathlib.Path(__file__).parent
_LONG = ("train", "decode", "scripts", "serve", "parallel")  # their files take longest


def _keep_those_of_one_device() -> None:
    """Those of several aren't read back: see `runtime.keep_compiled`.

    JAX has no public way to choose.
    """
    keep = compilation_cache.put_executable_and_time

    def keep_if_alone(key, name, executable, *rest):
        if len(executable.local_devices()) == 1:
            keep(key, name, executable, *rest)

    compilation_cache.put_executable_and_time = keep_if_alone


_keep_those_of_one_device()


@pytest.fixture(scope="module", autouse=True)
def programs_are_freed_before_there_are_too_many():
    """After a file of tests, when there are many; the next one compiles its own."""
    from jmoe.train import compiled

    yield
    if compiled.make_room(share=0.3):
        assert not compiled.make_room(share=0.3)


@pytest.fixture(scope="session")
def compile_once():
    """Returns a context in which runs with the same steps share their programs."""
    from tests.train import whole_runs

    return whole_runs.sharing_programs()


@pytest.fixture(scope="module")
def sharing_programs(compile_once):
    """Runs of this module, and of others that ask for it, share programs."""
    with compile_once():
        yield


def pytest_collection_modifyitems(items):
    """Long files first: else a worker has one at the end, and the others wait."""

    def place(item):
        folder = item.path.relative_to(_TESTS).parts[0]
        return _LONG.index(folder) if folder in _LONG else len(_LONG)

    items.sort(key=place)


def pytest_collection_finish():
    """Few collections of garbage: to trace a program makes millions of objects.

    What there is by then, modules and tests, stays.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_configure(config):
    """Before any test file is imported: at first use, XLA reads its flags for good."""
    flags = [os.environ.get("XLA_FLAGS", "")]
    flags.append("--xla_force_host_platform_device_count=16")
    # Devices that share two cores with other tests may be late, and none is lost.
    flags.append("--xla_cpu_collective_call_terminate_timeout_seconds=600")
    marked = config.option.markexpr
    if marked == "hopper":  # what is compiled for absent devices can't be read back
        jax.config.update("jax_enable_compilation_cache", False)
    if marked not in ("gpu", "hopper"):
        flags += _to_compile_fast()
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    if hasattr(config.option, "loadscopereorder"):  # else xdist sorts files otherwise
        config.option.loadscopereorder = False


def _to_compile_fast() -> list[str]:
    """Compiling is most of what tests on CPUs take; so it takes a quarter of the time.

    Without LLVM's optimizations, in one piece (each of several is a copy of the program
    at first), and with XLA's older way to emit what it has fused, which JAX 0.11 no
    longer has.
    """
    flags = ["--xla_backend_optimization_level=0"]
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
    if jax.__version_info__ < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return flags
