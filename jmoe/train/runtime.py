"""What programs share: how their process is set up, and how a mistake ends it."""

import contextlib
import ctypes
import functools
import os
import pathlib
import platform
import re
import signal
import sys
from collections.abc import Callable
from logging import LogRecord
from typing import Any, NoReturn

from absl import app, flags, logging

from jmoe.config import checks
from jmoe.monitor import output

# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_LARGE = 2**25  # bytes; the largest threshold that glibc takes

COMPILED = "compiled"  # JAX's cache, in the directory where prepared data is cached
# Exit codes.
MISTAKE = 2
DIVERGED = 3
_STDOUT = 1  # file descriptor


def command(main: Callable[[list[str]], int]) -> Callable[[], NoReturn]:
    """Returns what runs `main` as a program, for a script or an entry point.

    `main` takes what absl leaves of the command line and returns the exit code. What
    it raises as ValueError or OSError is a mistake, told in one line; a run that has
    diverged (FloatingPointError) has a code of its own. Output that nobody reads any
    more (`| head`) ends it without a word.
    """
    module = sys.modules[main.__module__]

    def start() -> NoReturn:
        # absl's help is about the program's own file: here, the module.
        sys.modules["__main__"].__doc__ = module.__doc__
        for flag in flags.FLAGS.flags_by_module_dict().get(module.__name__, ()):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
        app.run(functools.partial(_answer, main))
        raise AssertionError("absl ends the process.")

    return start


def _answer(main: Callable[[list[str]], int], argv: list[str]) -> int:
    # What the terminal has no character for is shown as its number.
    with contextlib.suppress(AttributeError):  # a stream that isn't the terminal's
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore
    try:
        code = main(argv)
        if sys.stdout is not None:  # as after `>&-`
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return report_interrupt()
    except FloatingPointError as error:
        report_mistake(error)
        return DIVERGED
    except MemoryError as error:
        error.args = error.args or ("There is too little memory for this.",)
        return report_mistake(error)
    except (ValueError, OSError) as error:
        return report_mistake(error)


def set_up(argv: list[str]) -> None:
    """Does what comes first: refuses what is no flag, sets up memory and messages.

    Raises:
      app.UsageError: there are arguments besides flags; absl shows it with the flags.
    """
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    keep_freed_memory()
    log_warnings_only()


def outlive_output() -> None:
    """Makes the process go on, with a warning, when its output can't be written.

    For a program that is worth more than what it shows.
    """
    if sys.stdout is not None:
        sys.stdout = output.Forgiving(sys.stdout, "Standard output")


def path(flag: flags.FlagHolder[Any]) -> pathlib.Path:
    """Returns the path that a flag gives; raises as `checks.local_path` does."""
    return checks.local_path(flag.name, flag.value)


def text(flag: flags.FlagHolder[str]) -> str:
    """Returns what a flag gives, as UTF-8 whatever the locale.

    Raises:
      ValueError: its bytes aren't UTF-8.
    """
    return _utf8(flag.name, flag.value)


def texts(flag: flags.FlagHolder[list[str]]) -> tuple[str, ...]:
    """Returns what a flag that is repeatable gives, each as `text` does."""
    return tuple(_utf8(flag.name, value) for value in flag.value)


def _utf8(name: str, value: str) -> str:
    try:
        return os.fsencode(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}={value!r} must be UTF-8; it isn't at byte offset {error.start}."
        ) from error


def start_jax() -> None:
    """Makes JAX find its devices, in a process that is alone.

    Raises:
      ValueError: there are none of the platform that the user has chosen.
    """
    import jax

    if jax.distributed.is_initialized():  # first, processes agree on what they do
        return
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"JAX_PLATFORMS={jax.config.values['jax_platforms']!r}: JAX finds no such "
            "device here. Without the variable it takes what there is."
        ) from error


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
    """Returns how many devices the environment asks XLA to make of the CPU."""
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    asked = re.findall(flag, os.environ.get("XLA_FLAGS", ""))
    return int(asked[-1]) if asked else 1  # of several alike, the last one counts


def step_after_step() -> None:
    """Makes a step on CPU return before the next starts; call it before JAX runs.

    JAX frees a step's temporaries a moment after it reports its results as ready. A
    step that starts within that moment allocates as much again, for good: 1.6 GB at
    200M parameters. A server may run for minutes before it happens, and then seems to
    leak.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_compiled(directory: pathlib.Path) -> None:
    """Makes JAX keep compiled programs in `directory`, and find them there next time.

    JAX stores what took over a second to compile, under a key of the program, the
    devices and the versions. A cache that the user has chosen already, as by
    JAX_COMPILATION_CACHE_DIR, stays.

    For several devices of CPUs, in one process or in many, nothing is kept, nor read
    from anywhere. A program that XLA for CPUs reads back has lost the order of
    collectives that don't wait for each other (JAX 0.10.2): two devices may then wait
    for each other in different ones, until XLA ends the process. Call it when JAX has
    started, as it asks for the devices.

    Raises:
      OSError: the directory isn't there and can't be made.
    """
    import jax  # its start-up can wait until the script knows what to do
    from jax.experimental.compilation_cache import compilation_cache

    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # if a program was compiled before
        return
    directory.mkdir(parents=True, exist_ok=True)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))


def log_warnings_only() -> None:
    """Leaves the terminal to the script, unless --verbosity says otherwise.

    By default absl shows a program's INFO messages, of which Orbax has a page for every
    checkpoint, and some more of an error that it then raises.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_logger().addFilter(_is_not_raised_too)


def _is_not_raised_too(record: LogRecord) -> bool:
    """Returns whether it isn't an exception, shown with traceback, of Orbax."""
    is_orbax = "orbax" in pathlib.PurePath(record.pathname).parts
    return not (is_orbax and record.exc_info)


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
