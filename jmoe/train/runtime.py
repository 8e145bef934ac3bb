"""What scripts share: how their process is set up, and how a mistake ends it."""

import ctypes
import os
import pathlib
import platform
import re
import signal
import sys

from absl import app, flags, logging

# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_LARGE = 2**25  # bytes; the largest threshold that glibc takes

COMPILED = "compiled"  # JAX's cache, in the directory where prepared data is cached
# Exit codes.
MISTAKE = 2
DIVERGED = 3


def set_up(argv: list[str]) -> None:
    """What a script does first: refuses what is no flag, sets up memory and messages.

    Raises:
      app.UsageError: there are arguments besides flags; absl shows it with the flags.
    """
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    keep_freed_memory()
    log_warnings_only()


def keep_freed_memory() -> bool:
    """Makes glibc keep what is freed, for the next step to use; whether it does.

    A step's buffers are so large that glibc would return them to the system after each
    step and get them back page by page, zeroed, in the next: 10 to 20% of a training
    step on CPU. Call it first thing in a program, before any thread has an arena of
    its own. Elsewhere than on glibc it does nothing.

    With several virtual devices, large blocks are returned all the same. Theirs lie
    side by side, and where one was, the next step's doesn't fit: to align a block,
    glibc looks for more room than the block then takes. Such a heap grows with every
    step, by 2 GB in a pipeline of four ranks. Small blocks are then shared out to
    several arenas, as the devices' threads would wait for each other at one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_TRIM_THRESHOLD: -1}
    if _virtual_devices() > 1:
        settings |= {_MMAP_THRESHOLD: _LARGE}
    else:
        settings |= {_MMAP_MAX: 0, _ARENA_MAX: 1}
    return all(mallopt(name, value) for name, value in settings.items())


def _virtual_devices() -> int:
    """How many the environment asks XLA to make of the CPU."""
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    asked = re.findall(flag, os.environ.get("XLA_FLAGS", ""))
    return int(asked[-1]) if asked else 1  # of several alike, the last one counts


def step_after_step() -> None:
    """On CPU, makes a step return before the next one starts; call it before JAX runs.

    JAX frees a step's temporaries a moment after it reports its results as ready. A
    step that starts within that moment allocates as much again, for good: 1.6 GB at
    200M parameters.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_compiled(directory: pathlib.Path) -> None:
    """Makes JAX keep compiled programs in `directory`, and find them there next time.

    JAX stores what took over a second to compile, under a key of the program, the
    devices and the versions. A cache that the user has chosen already, as by
    JAX_COMPILATION_CACHE_DIR, stays.
    """
    import jax  # its start-up can wait until the script knows what to do

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))


def log_warnings_only() -> None:
    """Leaves the terminal to the script, unless --verbosity says otherwise.

    By default absl shows a program's INFO messages, of which Orbax has a page for every
    checkpoint.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def report_interrupt() -> int:
    """Says that Ctrl-C ended the process, and returns the exit code for it."""
    print("SIGINT: ended.", file=sys.stderr)
    return 128 + signal.SIGINT


def report_mistake(error: Exception) -> int:
    """Tells the user what was wrong, and returns the exit code for it.

    Where in the code it was noticed is shown by --verbosity=0.
    """
    print(f"error: {error}", file=sys.stderr)
    logging.info("It was noticed here:", exc_info=error)
    return MISTAKE
